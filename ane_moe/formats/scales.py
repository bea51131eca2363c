"""Scales of quantised blocks, as fp16 holds them."""

import numpy as np

from ane_moe.half import from_half, narrowed

LEAST_SCALE = 2.0**-24  # the smallest fp16 number


def fp16_scale(scale: np.ndarray, top: int) -> np.ndarray:
    """The fp32 scale as fp16 holds it: not 0, rounded up where it is subnormal and coarse (a lower
    one would cut off the largest weights), and not so large that `top` times it overflows."""
    stored = narrowed(np.maximum(scale, np.float32(LEAST_SCALE)))
    low = from_half(stored) < scale * np.float32(1 - 2**-10)
    stored = np.where(low, np.nextafter(stored, np.float16(np.inf)), stored)
    high = from_half(stored) * np.float32(top) >= 65520
    return np.where(high, np.nextafter(stored, np.float16(0)), stored)
