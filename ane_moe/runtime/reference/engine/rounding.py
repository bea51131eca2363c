"""Numbers as the Neural Engine reads and writes them: fp16 values, held in fp32 tensors."""

import torch
from torch import Tensor

LARGEST = 65504.0  # of fp16
EXPONENT_31 = 65536.0  # what an infinite fp16 is read as; a NaN is read with its mantissa
MANTISSA_SHIFT = 13  # from fp32's 23 bits to fp16's 10


def to_fp16(y: Tensor) -> Tensor:
    """fp32 `y` rounded to fp16, halves away from zero, -0 as +0; Inf beyond fp16."""
    near = y.half().float()  # halves to even
    far = 2 * y - near  # where y lies midway, its neighbour on the other side; exact
    midway = (far.half().float() == far) & (far.abs() > near.abs())
    return torch.where(midway, far, near) + 0.0


def decoded(x: Tensor) -> Tensor:
    """fp32 `x` as the engine reads an fp16 number: Inf is 65536, NaN a number up to 131008."""
    narrow = x.half().float()
    if bool(torch.isfinite(narrow).all()):
        return narrow
    x = torch.where(torch.isnan(x), x, narrow)  # a NaN's mantissa counts
    mantissa = (x.view(torch.int32) >> MANTISSA_SHIFT) & 0x3FF
    number = torch.copysign(EXPONENT_31 * (1 + mantissa / 1024), x)
    return torch.where(torch.isfinite(x), x, number)
