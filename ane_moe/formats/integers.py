"""Integers and scales of least error: where the largest weights may be cut off, or inputs count."""

import numpy as np
import torch

from ane_moe.formats.scales import LEAST_SCALE, fp16_scale
from ane_moe.half import from_half

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)


def fit_integers(
    moments: np.ndarray | None,
    top: int,
    clipped: bool,
    weight: np.ndarray,
    data: np.ndarray,
    scale: np.ndarray,
) -> None:
    """Write int8 `data` `(R, B, n)` and fp16 `scale` `(R, B)` of fp32 `weight` `(R, B, n)`.

    `moments` `(B n,)` weigh errors. `clipped` tries CLIPS of each block's largest weight, and takes
    the one of least error.
    """
    w = torch.from_numpy(weight)
    m = None if moments is None else torch.from_numpy(moments).float().reshape(1, w.shape[1], -1)
    integers, scales = _integers(w, m, top, CLIPS if clipped else CLIPS[:1])
    data[...], scale[...] = integers.to(torch.int8).numpy(), scales[:, :, 0].half().numpy()


def _integers(
    w: torch.Tensor, m: torch.Tensor | None, top: int, clips: tuple[float, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers and scales of `(R, B, n)`, the clip of least error for each block."""
    largest = w.abs().amax(2, keepdim=True)
    best_q, best_s, least = None, None, None
    for clip in clips:
        scale = _fp16_scale(largest * (clip / top), top)
        q = (w / scale).round_().clamp_(-top, top)
        error = ((q * scale - w) ** 2 * (1 if m is None else m)).sum(2, keepdim=True)
        if best_q is None or best_s is None or least is None:
            best_q, best_s, least = q, scale, error
        else:
            better = error < least
            best_q, best_s = torch.where(better, q, best_q), torch.where(better, scale, best_s)
            least = torch.where(better, error, least)
    assert best_q is not None and best_s is not None
    return best_q, best_s if m is None else _refined(w, m, best_q, best_s, top)


def _refined(
    w: torch.Tensor, m: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, top: int
) -> torch.Tensor:
    """The scale of least squares for these integers; where there is none, the one given."""
    squares = (m * q * q).sum(2, keepdim=True)
    fitted = (m * w * q).sum(2, keepdim=True) / squares.clamp(min=1e-30)
    return torch.where((squares > 0) & (fitted > LEAST_SCALE), _fp16_scale(fitted, top), scale)


def _fp16_scale(scale: torch.Tensor, top: int) -> torch.Tensor:
    return torch.from_numpy(from_half(fp16_scale(scale.numpy(), top)))
