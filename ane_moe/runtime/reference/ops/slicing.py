"""Ops that read or write a part of a tensor, given by positions."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ane_moe.runtime.reference.ops.table import Kernel, Op


def _axis_indices(
    size: int, begin: int, end: int, stride: int, masks: tuple[bool, bool, bool]
) -> range:
    """The positions one axis of a slice selects, by numpy's rules; a squeezed axis selects `begin`
    alone."""
    begin_mask, end_mask, squeeze = masks
    if squeeze:
        start = 0 if begin_mask else begin + size if begin < 0 else begin
        if not 0 <= start < size:
            raise IndexError(f"index {begin} is out of an axis of size {size}")
        return range(start, start + 1)
    return range(size)[slice(None if begin_mask else begin, None if end_mask else end, stride)]


@dataclass(frozen=True)
class _Cut:
    """What one axis keeps of a slice."""

    axis: int
    start: int
    length: int
    step: int
    indices: Tensor | None  # where the step is negative, which torch cannot slice by


class _Slicer:
    """A slice by begin, end, stride and masks, solved once per shape."""

    def __init__(
        self,
        begin: list[int],
        end: list[int],
        stride: list[int] | None,
        begin_mask: list[bool] | None,
        end_mask: list[bool] | None,
        squeeze_mask: list[bool] | None,
    ):
        rank = len(begin)
        never = [False] * rank
        masks = zip(begin_mask or never, end_mask or never, squeeze_mask or never, strict=True)
        self.axes = list(zip(begin, end, stride or [1] * rank, masks, strict=True))
        self.ranges = lru_cache(maxsize=8)(self._ranges)
        self.cuts = lru_cache(maxsize=8)(self._cuts)

    def _ranges(self, shape: torch.Size) -> list[range]:
        return [_axis_indices(size, *axis) for size, axis in zip(shape, self.axes, strict=True)]

    def _cuts(self, shape: torch.Size) -> list[_Cut]:
        return [
            _Cut(
                axis,
                kept.start if len(kept) else 0,
                kept[-1] + 1 - kept.start if len(kept) else 0,
                kept.step,
                torch.tensor(kept, dtype=torch.int64) if kept.step < 0 else None,
            )
            for axis, kept in enumerate(self.ranges(shape))
            if kept != range(shape[axis])
        ]

    def take(self, x: Tensor) -> Tensor:
        for cut in self.cuts(x.shape):
            if cut.indices is not None:
                x = x.index_select(cut.axis, cut.indices)
                continue
            x = x.narrow(cut.axis, cut.start, cut.length)
            if cut.step > 1:
                x = x[(slice(None),) * cut.axis + (slice(None, None, cut.step),)]
        return x

    def put(self, x: Tensor, update: Tensor) -> Tensor:
        """A copy of `x` with `update` where `take` reads."""
        y, ranges = x.clone(), self.ranges(x.shape)
        update = update.reshape([len(kept) for kept in ranges])
        if all(kept.step > 0 for kept in ranges):
            self.take(y).copy_(update)
        else:
            y[
                torch.meshgrid(
                    *(torch.tensor(kept, dtype=torch.int64) for kept in ranges), indexing="ij"
                )
            ] = update
        return y


def _slice_by_index(
    begin: list[int],
    end: list[int],
    stride: list[int] | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Kernel:
    slicer = _Slicer(begin, end, stride, begin_mask, end_mask, squeeze_mask)
    squeezed = tuple(axis for axis, mask in enumerate(squeeze_mask or ()) if mask)
    if not squeezed:
        return slicer.take
    return lambda x: slicer.take(x).squeeze(squeezed)


def _slice_update(
    begin: list[int],
    end: list[int],
    stride: list[int] | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Kernel:
    return _Slicer(begin, end, stride, begin_mask, end_mask, squeeze_mask).put


def _slice_by_size(begin: list[int], size: list[int]) -> Kernel:
    def kernel(x: Tensor) -> Tensor:
        for axis, (start, length) in enumerate(zip(begin, size, strict=True)):
            start = start + x.shape[axis] if start < 0 else start
            x = x.narrow(axis, start, x.shape[axis] - start if length == -1 else length)
        return x

    return kernel


def _crop(crop_height: list[int], crop_width: list[int]) -> Kernel:
    def kernel(x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        return x[
            ..., crop_height[0] : height - crop_height[1], crop_width[0] : width - crop_width[1]
        ]

    return kernel


def _sliding_windows(axis: int, size: int, stride: int = 1) -> Kernel:
    def kernel(x: Tensor) -> Tensor:
        at = axis % x.dim()
        return x.unfold(at, size, stride).movedim(-1, at + 1)

    return kernel


OPS = (
    Op("slice_by_index", _slice_by_index, half="native"),
    Op("slice_by_size", _slice_by_size, half="native"),
    Op("slice_update", _slice_update, "x update", "native", since=18, alike="x update"),
    Op("crop", _crop, half="native"),
    Op("sliding_windows", _sliding_windows, half="native"),
)
