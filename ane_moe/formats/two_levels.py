"""The scale of a palette whose levels are given: 0.5 and 1.5 times it, of both signs."""

import numpy as np
import torch

from ane_moe.formats.scales import LEAST_SCALE

SCALE_ROUNDS = 8
LARGEST_FIXED_SCALE = 43648.0  # 1.5 times the next larger fp16 number is infinite


def two_level_scale(weight: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """fp16 scales `(R,)` of fp32 `(R, n)`: least squares for the levels chosen, in turns (Lloyd for
    a fixed shape). Errors are weighed by fp32 `moments` `(n,)`."""
    magnitude, m = torch.from_numpy(weight).abs(), torch.from_numpy(moments).float()
    weighted, total, mass = m * magnitude, magnitude @ m, m.sum()
    scale, outer = magnitude.mean(1).clamp(min=LEAST_SCALE), torch.empty_like(magnitude)
    for _ in range(SCALE_ROUNDS):
        # The level is 0.5 + outer, its square 0.25 + 2 outer.
        torch.ge(magnitude, scale[:, None], out=outer)
        above = (weighted * outer).sum(1)
        scale = ((total / 2 + above) / (mass / 4 + 2 * (outer @ m)).clamp(min=1e-30)).clamp(
            min=LEAST_SCALE
        )
    return scale.clamp(max=LARGEST_FIXED_SCALE).half().numpy()
