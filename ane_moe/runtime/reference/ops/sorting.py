"""Sorting, running sums, and tensors made from numbers."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ane_moe.mlprogram.program import TensorType
from ane_moe.runtime.reference.dtypes import torch_dtype
from ane_moe.runtime.reference.ops.arithmetic import Arithmetic
from ane_moe.runtime.reference.ops.table import Kernel, Op, plain

Out = Sequence[TensorType]


def _sorted(x: Tensor, axis: int, ascending: bool) -> tuple[Tensor, Tensor]:
    """Values and indices; equal elements keep their order."""
    values, indices = torch.sort(x, dim=axis, descending=not ascending, stable=True)
    return values, indices


def _topk(
    k: int = 1,
    axis: int = -1,
    ascending: bool = False,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: str = "int32",
) -> Kernel:
    def kernel(x: Tensor) -> tuple[Tensor, ...]:
        values, indices = _sorted(x, axis, ascending)
        count = x.shape[axis] if k == -1 else k
        chosen = values.narrow(axis, 0, count)
        if not return_indices:
            return (chosen,)
        return chosen, indices.narrow(axis, 0, count).to(torch_dtype(output_indices_dtype))

    return kernel


def _argsort(axis: int = -1, ascending: bool = False) -> Kernel:
    return lambda x: _sorted(x, axis, ascending)[1].to(torch.int32)


def _cumsum(
    arith: Arithmetic, axis: int = 0, exclusive: bool = False, reverse: bool = False
) -> Kernel:
    def kernel(x: Tensor) -> Tensor:
        x = x.flip(axis) if reverse else x
        y = arith.cumsum(x, axis)
        if exclusive:
            y = torch.cat(
                [torch.zeros_like(y.narrow(axis, 0, 1)), y.narrow(axis, 0, y.shape[axis] - 1)], axis
            )
        return y.flip(axis) if reverse else y

    return kernel


def _one_hot(
    out: Out, one_hot_vector_size: int, axis: int = -1, on_value: float = 1, off_value: float = 0
) -> Kernel:
    dtype = torch_dtype(out[0].dtype)
    classes = torch.arange(one_hot_vector_size)

    def kernel(indices: Tensor) -> Tensor:
        hot = indices.to(torch.int64).unsqueeze(-1) == classes
        on, off = torch.tensor(on_value, dtype=dtype), torch.tensor(off_value, dtype=dtype)
        return torch.where(hot, on, off).movedim(-1, axis)

    return kernel


def _non_zero(x: Tensor) -> Tensor:
    return torch.nonzero(x).to(torch.int32)


def _fill(out: Out, shape: list[int], value: float | bool = 0.0) -> Kernel:
    dtype = torch_dtype(out[0].dtype)
    return lambda: torch.full(shape, value, dtype=dtype)


def _fill_like(out: Out, value: float | bool = 0.0) -> Kernel:
    dtype = torch_dtype(out[0].dtype)
    return lambda reference: torch.full(reference.shape, value, dtype=dtype)


def _range(out: Out, start: float, end: float, step: float) -> Kernel:
    dtype = torch_dtype(out[0].dtype)

    def kernel() -> Tensor:
        count = max(0, math.ceil((end - start) / step))
        steps = torch.arange(count, dtype=torch.float64 if dtype.is_floating_point else torch.int64)
        return (steps * step + start).to(dtype)

    return kernel


def _source(size: int, before: int, after: int, mode: str) -> Tensor:
    """Where each element of a reflected or replicated axis comes from."""
    at = torch.arange(-before, size + after)
    if mode == "replicate":
        return at.clamp(0, size - 1)
    if max(before, after) >= size:
        raise ValueError(f"cannot reflect {max(before, after)} elements of an axis of size {size}")
    return (size - 1 - (at.abs() - (size - 1)).abs()).abs()


def _pad(pad: list[int], mode: str = "constant", constant_val: float = 0.0) -> Kernel:
    if mode not in ("constant", "reflect", "replicate"):
        raise ValueError(f"unknown padding mode {mode}")

    def kernel(x: Tensor) -> Tensor:
        pairs = list(zip(pad[::2], pad[1::2], strict=True))
        if mode == "constant":
            return torch.nn.functional.pad(
                x, [side for pair in reversed(pairs) for side in pair], value=constant_val
            )
        for axis, (before, after) in enumerate(pairs, x.dim() - len(pairs)):
            if before or after:
                x = x.index_select(axis, _source(x.shape[axis], before, after, mode))
        return x

    return kernel


OPS = (
    Op("topk", _topk, half="native", note="the lowest index first among equal elements"),
    Op("argsort", _argsort, half="native", note="stable"),
    Op("cumsum", _cumsum),
    Op("one_hot", _one_hot, "indices", "native", note="an index out of range has no hot element"),
    Op("non_zero", plain(_non_zero), half="native"),
    Op("fill", _fill, "", "native"),
    Op("fill_like", _fill_like, "ref_tensor", "native", since=16),
    Op("range_1d", _range, "", "native"),
    Op("pad", _pad, half="native"),
)
