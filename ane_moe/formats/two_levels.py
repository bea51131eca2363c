"""The scale of a palette whose levels are given: 0.5 and 1.5 times it, of both signs."""

import numpy as np
import torch

from ane_moe.formats.scales import LEAST_SCALE

SCALE_ROUNDS = 8
LARGEST_FIXED_SCALE = 43648.0  # 1.5 times the next larger fp16 number is infinite


def two_level_scale(weight: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """fp16 scales `(R,)` of fp32 `(R, n)`: what a row is of that holds just the levels of some
    scale, as training at two bits leaves it; else least squares for the levels chosen, in turns
    (Lloyd for a fixed shape). Errors are weighed by fp32 `moments` `(n,)`."""
    magnitude = torch.from_numpy(weight).abs()
    scale, exact = _scale_of_levels(magnitude)
    if not exact.all():
        fitted = _least_squares(magnitude, torch.from_numpy(moments).float())
        scale = torch.where(exact, scale, fitted)
    return scale.half().numpy()


def _scale_of_levels(magnitude: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale `(R,)` of which a row's least magnitude is the inner level, and whether the row
    holds nothing but its two levels, as fp16 rounds them."""
    inner = magnitude.amin(1, keepdim=True)
    scale = 2 * inner
    outer = (1.5 * scale).half().float()
    levels = ((magnitude == inner) | (magnitude == outer)).all(1)
    scale = scale[:, 0]
    return scale, levels & (scale > 0) & (scale <= LARGEST_FIXED_SCALE)


def _least_squares(magnitude: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    weighted, total, mass = m * magnitude, magnitude @ m, m.sum()
    scale, outer = magnitude.mean(1).clamp(min=LEAST_SCALE), torch.empty_like(magnitude)
    for _ in range(SCALE_ROUNDS):
        # The level is 0.5 + outer, its square 0.25 + 2 outer.
        torch.ge(magnitude, scale[:, None], out=outer)
        above = (weighted * outer).sum(1)
        scale = ((total / 2 + above) / (mass / 4 + 2 * (outer @ m)).clamp(min=1e-30)).clamp(
            min=LEAST_SCALE
        )
    return scale.clamp(max=LARGEST_FIXED_SCALE)
