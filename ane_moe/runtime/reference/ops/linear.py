"""Matrix products."""

import torch
from torch import Tensor

from ane_moe.runtime.reference.ops.arithmetic import Arithmetic
from ane_moe.runtime.reference.ops.table import Kernel, Op


def _matmul(arith: Arithmetic, transpose_x: bool = False, transpose_y: bool = False) -> Kernel:
    def kernel(x: Tensor, y: Tensor) -> Tensor:
        # A vector is a row on the left and a column on the right, whatever the transposition says.
        x = x.transpose(-1, -2) if transpose_x and x.dim() > 1 else x
        y = y.transpose(-1, -2) if transpose_y and y.dim() > 1 else y
        return arith.matmul(*_of_one_type(x, y))
    return kernel


def _of_one_type(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """iOS 17 takes whole numbers on one side and floats on the other: the product is of floats."""
    if x.dtype == y.dtype:
        return x, y
    wider = torch.promote_types(x.dtype, y.dtype)
    return x.to(wider), y.to(wider)


def _linear(arith: Arithmetic) -> Kernel:
    def kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = arith.matmul(*_of_one_type(x, weight.transpose(0, 1)))
        return y if bias is None else arith.round(y) + bias
    return kernel


def _einsum(equation: str, arith: Arithmetic) -> Kernel:
    """The two forms the op allows are batched products over one shared letter; others go to torch as they are."""
    left, right = equation.replace(" ", "").split("->")[0].split(",")
    shared = left[-1]

    def kernel(values: list[Tensor]) -> Tensor:
        x, y = values
        if len(left) == 4 and right[0] == left[0] and right[1] == shared:       # nchw,nwhu->nchu
            return arith.matmul(x.permute(0, 2, 1, 3), y.permute(0, 2, 1, 3)).permute(0, 2, 1, 3)
        if len(left) == 3 and right[0] == shared:                                # chw,whr->chr
            return arith.matmul(x.permute(1, 0, 2), y.permute(1, 0, 2)).permute(1, 0, 2)
        return torch.einsum(equation, x, y)
    return kernel


OPS = (
    Op("matmul", _matmul, "x y"),
    Op("linear", _linear, "x weight bias?"),
    Op("einsum", _einsum, "values*"),
)
