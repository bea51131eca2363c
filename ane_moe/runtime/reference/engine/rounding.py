"""Numbers as the Neural Engine reads and writes them: fp16 values, held in fp32 tensors."""

import math

import torch
from torch import Tensor

LARGEST = 65504.0  # of fp16
INFINITE_FROM = 65520.0  # what is rounded to a number beyond it
EXPONENT_31 = 65536.0  # what an infinite fp16 is read as; a NaN is read with its mantissa
SMALLEST_NORMAL, SUBNORMAL_STEP = 2.0**-14, 2.0**-24
SURPLUS_BITS = 13  # of fp32's mantissa over fp16's


def to_fp16(y: Tensor) -> Tensor:
    """fp32 `y` rounded to fp16, halves away from zero, -0 as +0; Inf beyond fp16."""
    half = 1 << (SURPLUS_BITS - 1)  # added to the magnitude, whose surplus is then cut off
    near = ((y.view(torch.int32) + half) & -(1 << SURPLUS_BITS)).view(torch.float32)
    size = y.abs()
    tiny = size < SMALLEST_NORMAL
    if bool(tiny.any()):
        steps = size / SUBNORMAL_STEP
        whole = steps.floor()
        whole = whole + (steps - whole >= 0.5)  # a sum with 0.5 would be rounded itself
        near = torch.where(tiny, torch.copysign(whole * SUBNORMAL_STEP, y), near)
    if not largest(y) < INFINITE_FROM:
        beyond = torch.copysign(torch.full((), math.inf), y)
        near = torch.where(size < INFINITE_FROM, near, torch.where(y.isnan(), y, beyond))
    return near + 0.0


def decoded(x: Tensor) -> Tensor:
    """fp16 values as the engine reads them: Inf is 65536, NaN a number up to 131008."""
    if largest(x) <= LARGEST:
        return x
    mantissa = (x.contiguous().view(torch.int32) >> SURPLUS_BITS) & 0x3FF
    number = torch.copysign(EXPONENT_31 * (1 + mantissa / 1024), x)
    return torch.where(torch.isfinite(x), x, number)


def largest(x: Tensor) -> float:
    """The largest magnitude, NaN where there is one, without a copy of `x`."""
    if not x.numel():
        return 0.0
    high, low = float(x.amax()), float(x.amin())
    return max(high, -low) if high == high else high
