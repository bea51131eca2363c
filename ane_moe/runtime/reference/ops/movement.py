"""Ops that rearrange, join and repeat tensors without computing with their values."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ane_moe.mlprogram.program import TensorType
from ane_moe.runtime.reference.dtypes import torch_dtype
from ane_moe.runtime.reference.ops.table import Kernel, Op


def _reshape(shape: list[int]) -> Kernel:
    def kernel(x: Tensor) -> Tensor:
        # 0 keeps the dimension of x, but only at equal rank; an empty tensor keeps its zeros either
        # way.
        if 0 in shape and len(shape) == x.dim():
            return x.reshape([size if size else x.shape[axis] for axis, size in enumerate(shape)])
        return x.reshape(shape)

    return kernel


def _reshape_from_right(shape: list[int]) -> Kernel:
    same_rank = _reshape(shape)

    def kernel(x: Tensor) -> Tensor:
        # Of an empty tensor, a 0 at another rank is a computed size, and stays.
        if 0 not in shape or len(shape) == x.dim() or not x.numel():
            return same_rank(x)
        kept = ([1] * len(shape) + list(x.shape))[-len(shape) :]
        return x.reshape([size or kept[axis] for axis, size in enumerate(shape)])

    return kernel


def _reshape_like(begins: list[int], ends: list[int], end_masks: list[bool]) -> Kernel:
    def kernel(x: Tensor, references: list[Tensor]) -> Tensor:
        shape: list[int] = []
        for reference, begin, end, to_last in zip(references, begins, ends, end_masks, strict=True):
            shape += reference.shape[begin : None if to_last else end]
        return x.reshape(shape)

    return kernel


def _transpose(perm: list[int]) -> Kernel:
    return lambda x: x.permute(perm)


def _expand_dims(axes: list[int] | int) -> Kernel:
    wanted = [axes] if isinstance(axes, int) else axes

    def kernel(x: Tensor) -> Tensor:
        rank = x.dim() + len(wanted)
        for axis in sorted(axis % rank for axis in wanted):
            x = x.unsqueeze(axis)
        return x

    return kernel


def _squeeze(axes: list[int] | None = None) -> Kernel:
    def kernel(x: Tensor) -> Tensor:
        if axes is None:
            return x.squeeze()
        if any(x.shape[axis] != 1 for axis in axes):
            raise ValueError(f"cannot squeeze axes {axes} of shape {tuple(x.shape)}")
        return x.squeeze(tuple(axes))

    return kernel


def _flatten2d(axis: int = 1) -> Kernel:
    def kernel(x: Tensor) -> Tensor:
        return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))

    return kernel


def _concat(axis: int, interleave: bool = False) -> Kernel:
    def kernel(values: list[Tensor]) -> Tensor:
        if interleave:
            at = axis % values[0].dim()
            return torch.stack(values, at + 1).flatten(at, at + 1)
        if not values[0].dim():
            return torch.stack(values)
        return torch.cat(values, axis)

    return kernel


def _stack(axis: int) -> Kernel:
    return lambda values: torch.stack(values, axis)


def _split(
    axis: int, num_splits: int | None = None, split_sizes: list[int] | None = None
) -> Kernel:
    def kernel(x: Tensor) -> tuple[Tensor, ...]:
        sizes = (
            split_sizes
            if split_sizes is not None
            else [x.shape[axis] // (num_splits or 1)] * (num_splits or 1)
        )
        return torch.split(x, sizes, axis)

    return kernel


def _tile(reps: list[int]) -> Kernel:
    return lambda x: x.repeat(reps)


def _reverse(axes: list[int] | None = None) -> Kernel:
    return lambda x: x.flip(axes if axes is not None else list(range(x.dim())))


def _shape(out: Sequence[TensorType]) -> Kernel:
    dtype = torch_dtype(out[0].dtype)
    return lambda x: torch.tensor(x.shape, dtype=dtype)


def _band_part(lower: int = -1, upper: int = -1) -> Kernel:
    def kernel(x: Tensor) -> Tensor:
        y = x if lower < 0 else x.triu(-lower)
        return y if upper < 0 else y.tril(upper)

    return kernel


def _reverse_sequence(seq_axis: int = 0, batch_axis: int = 0) -> Kernel:
    def kernel(x: Tensor, lengths: Tensor) -> Tensor:
        rows = x.movedim((batch_axis, seq_axis), (0, 1))
        position = torch.arange(rows.shape[1]).expand(rows.shape[0], -1)
        last = lengths.to(torch.int64)[:, None]
        source = torch.where(position < last, last - 1 - position, position)
        return rows[torch.arange(rows.shape[0])[:, None], source].movedim(
            (0, 1), (batch_axis, seq_axis)
        )

    return kernel


def _native(name: str, make: Kernel, tensors: str = "x", **more: object) -> Op:
    return Op(name, make, tensors, "native", **more)  # type: ignore[arg-type]


OPS = (
    _native("reshape", _reshape),
    _native(
        "reshape", _reshape_from_right, since=17, note="0 keeps a dimension, counted from the right"
    ),
    _native("reshape_like", _reshape_like, "x ref_tensors*", since=16),
    _native("transpose", _transpose),
    _native("expand_dims", _expand_dims),
    _native("squeeze", _squeeze),
    _native("flatten2d", _flatten2d),
    _native("concat", _concat, "values*", alike="values"),
    _native("stack", _stack, "values*", alike="values"),
    _native("split", _split),
    _native("tile", _tile),
    _native("reverse", _reverse),
    _native("shape", _shape),
    _native("band_part", _band_part),
    _native("reverse_sequence", _reverse_sequence, "x lengths"),
)
