"""Matrix products."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ane_moe.mlprogram.program import TensorType
from ane_moe.runtime.reference.dtypes import torch_dtype
from ane_moe.runtime.reference.ops.arithmetic import Arithmetic
from ane_moe.runtime.reference.ops.table import Kernel, Op
from ane_moe.runtime.reference.stored_matrix import StoredMatrix

Out = Sequence[TensorType]
Pair = tuple[Tensor, Tensor]


def _matmul(
    out: Out, arith: Arithmetic, transpose_x: bool = False, transpose_y: bool = False
) -> Kernel:
    of_one_type = _of_one_type(out)

    def kernel(x: Tensor, y: Tensor | StoredMatrix) -> Tensor:
        if isinstance(y, StoredMatrix):
            return y.applied(x.transpose(-1, -2) if transpose_x and x.dim() > 1 else x)
        # A vector is a row on the left and a column on the right, whatever the transposition says.
        x = x.transpose(-1, -2) if transpose_x and x.dim() > 1 else x
        y = y.transpose(-1, -2) if transpose_y and y.dim() > 1 else y
        return arith.matmul(*of_one_type(x, y))

    return kernel


def _multiplies_rows(transpose_y: bool = False, **_: object) -> bool:
    """Whether `y` lies in memory as a `linear`'s weight does."""
    return transpose_y


def _of_one_type(out: Out) -> Callable[[Tensor, Tensor], Pair]:
    """iOS 17 takes a constant of whole numbers beside floats, and the reverse.

    The result is of the type of the side that is not constant.
    """
    floats = torch_dtype(out[0].dtype).is_floating_point

    def pair(x: Tensor, y: Tensor) -> Pair:
        if x.dtype is y.dtype:
            return x, y
        if not floats:
            return _whole(x), _whole(y)
        wider = torch.promote_types(x.dtype, y.dtype)
        return x.to(wider), y.to(wider)

    return pair


def _whole(x: Tensor) -> Tensor:
    """`x` as whole numbers; fractions are refused: what Core ML makes of them is not documented."""
    whole = x.to(torch.int32)
    if not torch.equal(whole.to(x.dtype), x):
        raise ValueError("a constant with fractions among whole numbers")
    return whole


def _linear(out: Out, arith: Arithmetic) -> Kernel:
    of_one_type = _of_one_type(out)

    def kernel(x: Tensor, weight: Tensor | StoredMatrix, bias: Tensor | None) -> Tensor:
        if isinstance(weight, StoredMatrix):
            y = weight.applied(x)
        else:
            y = arith.matmul(*of_one_type(x, weight.transpose(0, 1)))
        return y if bias is None else torch.add(*of_one_type(arith.round(y), bias))

    return kernel


def _einsum(equation: str, arith: Arithmetic) -> Kernel:
    """The two forms the op allows are batched products over one shared letter; others go to torch
    as they are."""
    left, right = equation.replace(" ", "").split("->")[0].split(",")
    shared = left[-1]

    def kernel(values: list[Tensor]) -> Tensor:
        x, y = values
        if len(left) == 4 and right[0] == left[0] and right[1] == shared:  # nchw,nwhu->nchu
            return arith.matmul(x.permute(0, 2, 1, 3), y.permute(0, 2, 1, 3)).permute(0, 2, 1, 3)
        if len(left) == 3 and right[0] == shared:  # chw,whr->chr
            return arith.matmul(x.permute(1, 0, 2), y.permute(1, 0, 2)).permute(1, 0, 2)
        return torch.einsum(equation, x, y)

    return kernel


FRACTIONS = "whole numbers times a constant with fractions is an error: it is not documented"

OPS = (
    Op("matmul", _matmul, "x y", note=FRACTIONS, matrix=("y", _multiplies_rows)),
    Op("linear", _linear, "x weight bias?", note=FRACTIONS, matrix=("weight", lambda **_: True)),
    Op("einsum", _einsum, "values*"),
)
