"""Ops that rearrange, slice and join tensors without computing with their values."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ane_moe.runtime.dtypes import torch_dtype
from ane_moe.runtime.ops.table import Kernel, Op
from ane_moe.runtime.program import TensorType


def _reshape(shape: list[int]) -> Kernel:
    def kernel(x: Tensor) -> Tensor:
        # 0 keeps the dimension of x, but only at equal rank; an empty tensor keeps its zeros either way.
        if 0 in shape and len(shape) == x.dim():
            return x.reshape([size if size else x.shape[axis] for axis, size in enumerate(shape)])
        return x.reshape(shape)
    return kernel


def _reshape_like(begins: list[int], ends: list[int], end_masks: list[bool]) -> Kernel:
    def kernel(x: Tensor, references: list[Tensor]) -> Tensor:
        shape: list[int] = []
        for reference, begin, end, to_last in zip(references, begins, ends, end_masks, strict=True):
            shape += reference.shape[begin:None if to_last else end]
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
            return torch.stack(values, axis + 1 if axis >= 0 else axis).flatten(*(
                (axis, axis + 1) if axis >= 0 else (axis - 1, axis)))
        if not values[0].dim():
            return torch.stack(values)
        return torch.cat(values, axis)
    return kernel


def _stack(axis: int) -> Kernel:
    return lambda values: torch.stack(values, axis)


def _split(axis: int, num_splits: int | None = None, split_sizes: list[int] | None = None) -> Kernel:
    def kernel(x: Tensor) -> tuple[Tensor, ...]:
        sizes = split_sizes if split_sizes is not None else [x.shape[axis] // (num_splits or 1)] * (num_splits or 1)
        return torch.split(x, sizes, axis)
    return kernel


def _tile(reps: list[int]) -> Kernel:
    return lambda x: x.repeat(reps)


def _reverse(axes: list[int] | None = None) -> Kernel:
    return lambda x: x.flip(axes if axes is not None else list(range(x.dim())))


def _shape(out: Sequence[TensorType]) -> Kernel:
    dtype = torch_dtype(out[0].dtype)
    return lambda x: torch.tensor(x.shape, dtype=dtype)


def _axis_indices(size: int, begin: int, end: int, stride: int, masks: tuple[bool, bool, bool]) -> range:
    """The positions one axis of a slice selects, by numpy's rules; a squeezed axis selects `begin` alone."""
    begin_mask, end_mask, squeeze = masks
    if squeeze:
        start = 0 if begin_mask else begin + size if begin < 0 else begin
        if not 0 <= start < size:
            raise IndexError(f"index {begin} is out of an axis of size {size}")
        return range(start, start + 1)
    return range(size)[slice(None if begin_mask else begin, None if end_mask else end, stride)]


def _ranges(x: Tensor, begin: list[int], end: list[int], stride: list[int] | None, begin_mask: list[bool] | None,
            end_mask: list[bool] | None, squeeze_mask: list[bool] | None) -> list[range]:
    rank = x.dim()
    never = [False] * rank
    masks = list(zip(begin_mask or never, end_mask or never, squeeze_mask or never, strict=True))
    return [_axis_indices(*axis) for axis in zip(x.shape, begin, end, stride or [1] * rank, masks, strict=True)]


def _take(x: Tensor, ranges: Sequence[range]) -> Tensor:
    for axis, chosen in enumerate(ranges):
        if chosen == range(x.shape[axis]):
            continue
        if chosen.step > 0:
            x = x.narrow(axis, chosen.start if len(chosen) else 0, max(0, _span(chosen)))
            if chosen.step > 1:
                x = x[(slice(None),) * axis + (slice(None, None, chosen.step),)]
        else:
            x = x.index_select(axis, torch.tensor(chosen, dtype=torch.int64))
    return x


def _span(chosen: range) -> int:
    return chosen[-1] + 1 - chosen.start if len(chosen) else 0


def _slice_by_index(begin: list[int], end: list[int], stride: list[int] | None = None,
                    begin_mask: list[bool] | None = None, end_mask: list[bool] | None = None,
                    squeeze_mask: list[bool] | None = None) -> Kernel:
    squeezed = tuple(axis for axis, mask in enumerate(squeeze_mask or ()) if mask)

    def kernel(x: Tensor) -> Tensor:
        y = _take(x, _ranges(x, begin, end, stride, begin_mask, end_mask, squeeze_mask))
        return y.squeeze(squeezed) if squeezed else y
    return kernel


def _slice_update(begin: list[int], end: list[int], stride: list[int] | None = None,
                  begin_mask: list[bool] | None = None, end_mask: list[bool] | None = None,
                  squeeze_mask: list[bool] | None = None) -> Kernel:
    def kernel(x: Tensor, update: Tensor) -> Tensor:
        ranges = _ranges(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
        y = x.clone()
        if all(chosen.step > 0 for chosen in ranges):
            _take(y, ranges).copy_(update.reshape([len(chosen) for chosen in ranges]))
        else:
            where = torch.meshgrid(*(torch.tensor(chosen, dtype=torch.int64) for chosen in ranges), indexing="ij")
            y[where] = update.reshape([len(chosen) for chosen in ranges])
        return y
    return kernel


def _slice_by_size(begin: list[int], size: list[int]) -> Kernel:
    def kernel(x: Tensor) -> Tensor:
        for axis, (start, length) in enumerate(zip(begin, size, strict=True)):
            start = start + x.shape[axis] if start < 0 else start
            x = x.narrow(axis, start, x.shape[axis] - start if length == -1 else length)
        return x
    return kernel


def _band_part(lower: int = -1, upper: int = -1) -> Kernel:
    def kernel(x: Tensor) -> Tensor:
        y = x if lower < 0 else x.triu(-lower)
        return y if upper < 0 else y.tril(upper)
    return kernel


def _crop(crop_height: list[int], crop_width: list[int]) -> Kernel:
    def kernel(x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        return x[..., crop_height[0]:height - crop_height[1], crop_width[0]:width - crop_width[1]]
    return kernel


def _reverse_sequence(seq_axis: int = 0, batch_axis: int = 0) -> Kernel:
    def kernel(x: Tensor, lengths: Tensor) -> Tensor:
        rows = x.movedim((batch_axis, seq_axis), (0, 1))
        position = torch.arange(rows.shape[1]).expand(rows.shape[0], -1)
        last = lengths.to(torch.int64)[:, None]
        source = torch.where(position < last, last - 1 - position, position)
        return rows[torch.arange(rows.shape[0])[:, None], source].movedim((0, 1), (batch_axis, seq_axis))
    return kernel


def _sliding_windows(axis: int, size: int, stride: int = 1) -> Kernel:
    def kernel(x: Tensor) -> Tensor:
        at = axis % x.dim()
        return x.unfold(at, size, stride).movedim(-1, at + 1)
    return kernel


def _native(name: str, make: Kernel, tensors: str = "x", **more: object) -> Op:
    return Op(name, make, tensors, "native", **more)            # type: ignore[arg-type]


OPS = (
    _native("reshape", _reshape),
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
    _native("slice_by_index", _slice_by_index),
    _native("slice_by_size", _slice_by_size),
    _native("slice_update", _slice_update, "x update", since=18),
    _native("band_part", _band_part),
    _native("crop", _crop),
    _native("reverse_sequence", _reverse_sequence, "x lengths"),
    _native("sliding_windows", _sliding_windows),
)
