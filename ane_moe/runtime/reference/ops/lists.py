"""Lists of tensors."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ane_moe.errors import UserError
from ane_moe.mlprogram.program import ListType, TensorType
from ane_moe.runtime.reference.dtypes import torch_dtype
from ane_moe.runtime.reference.lists import MAX_LENGTH, TensorList
from ane_moe.runtime.reference.ops.table import Kernel, Op, plain


def _make_list(
    out: Sequence[Any],
    elem_shape: Any = (),
    init_length: int = 1,
    dynamic_length: bool = True,
    dtype: str = "fp32",
) -> Kernel:
    """The declared type holds what `elem_shape` and `dtype` say, symbols as unknown sizes."""
    declared = out[0].element if isinstance(out[0], ListType) else None
    if not isinstance(declared, TensorType):
        raise ValueError("its result is not declared as a list of tensors")
    if not 0 <= init_length <= MAX_LENGTH:
        raise UserError("a list is too long", str(init_length), f"limit: {MAX_LENGTH}")
    known = tuple(size for size in declared.shape if size is not None)
    shape = known if len(known) == len(declared.shape) else None
    made = TensorList(torch_dtype(declared.dtype), shape, dynamic_length, (None,) * init_length)
    return lambda: made


def _length(ls: TensorList) -> Tensor:
    return torch.tensor(len(ls.elements), dtype=torch.int32)


def _read(ls: TensorList, index: Tensor) -> Tensor:
    return ls.read(int(index))


def _gather(ls: TensorList, indices: Tensor) -> Tensor:
    return ls.gather(indices.tolist())


def _write(ls: TensorList, index: Tensor, value: Tensor) -> TensorList:
    return ls.write([int(index)], [value])


def _scatter(ls: TensorList, indices: Tensor, value: Tensor) -> TensorList:
    return ls.write(indices.tolist(), list(value))


OPS = (
    Op("make_list", _make_list, "", "native", note="an element that was never written is zero"),
    Op("list_length", plain(_length), "ls", "native"),
    Op("list_read", plain(_read), "ls index", "native"),
    Op("list_gather", plain(_gather), "ls indices", "native"),
    Op(
        "list_write",
        plain(_write),
        "ls index value",
        "native",
        note="a write past the end makes the list longer, unless its length is fixed",
    ),
    Op("list_scatter", plain(_scatter), "ls indices value", "native"),
)
