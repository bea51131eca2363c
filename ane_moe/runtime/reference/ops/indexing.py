"""Gathers: reading by index."""

import torch
from torch import Tensor

from ane_moe.runtime.reference.ops.table import Kernel, Op


def wrap(indices: Tensor, size: int, negative: bool) -> Tensor:
    """`indices` as int64 in [0, size); raises IndexError where the op allows no such index."""
    indices = indices.to(torch.int64)
    if not indices.numel():
        return indices
    low, high = int(indices.min()), int(indices.max())
    if high >= size or low < (-size if negative else 0):
        raise IndexError(f"index {high if high >= size else low} is out of an axis of size {size}")
    return torch.where(indices < 0, indices + size, indices) if low < 0 else indices


def _gather(negative: bool, axis: int, batch_dims: int) -> Kernel:
    def kernel(x: Tensor, indices: Tensor) -> Tensor:
        at = axis % x.dim()
        chosen = wrap(indices, x.shape[at], negative)
        if not batch_dims:
            shape = (*x.shape[:at], *chosen.shape, *x.shape[at + 1 :])
            return x.index_select(at, chosen.reshape(-1)).reshape(shape)
        batch = x.shape[:batch_dims]
        rows = x.flatten(0, batch_dims - 1) if batch_dims > 1 else x
        picks = chosen.reshape(rows.shape[0], *chosen.shape[batch_dims:])
        parts = [
            row.index_select(at - batch_dims, pick.reshape(-1))
            for row, pick in zip(rows, picks, strict=True)
        ]
        shape = (*batch, *x.shape[batch_dims:at], *chosen.shape[batch_dims:], *x.shape[at + 1 :])
        return torch.stack(parts).reshape(shape)

    return kernel


def _gather_wrapping(axis: int = 0, batch_dims: int = 0) -> Kernel:
    return _gather(True, axis, batch_dims)


def _gather_in_bounds(axis: int = 0, batch_dims: int = 0, validate_indices: bool = False) -> Kernel:
    return _gather(False, axis, batch_dims)


def _along(negative: bool, axis: int) -> Kernel:
    return lambda x, indices: torch.gather(x, axis, wrap(indices, x.shape[axis], negative))


def _along_wrapping(axis: int = 0) -> Kernel:
    return _along(True, axis)


def _along_in_bounds(axis: int = 0, validate_indices: bool = False) -> Kernel:
    return _along(False, axis)


def _gather_nd(negative: bool, batch_dims: int) -> Kernel:
    def kernel(x: Tensor, indices: Tensor) -> Tensor:
        depth = indices.shape[-1]
        coordinates = [
            wrap(indices[..., i], x.shape[batch_dims + i], negative) for i in range(depth)
        ]
        batch = []
        for axis in range(batch_dims):
            shape = [1] * (indices.dim() - 1)
            shape[axis] = x.shape[axis]
            batch.append(torch.arange(x.shape[axis]).reshape(shape))
        return x[(*batch, *coordinates)]

    return kernel


def _nd_wrapping(batch_dims: int = 0) -> Kernel:
    return _gather_nd(True, batch_dims)


def _nd_in_bounds(batch_dims: int = 0, validate_indices: bool = False) -> Kernel:
    return _gather_nd(False, batch_dims)


def _select() -> Kernel:
    return lambda cond, a, b: torch.where(cond, a, b)


# Without validate_indices, Core ML's result for such an index "is undefined but memory safe".
BOUNDS = "an index out of bounds, or negative, is an error whether or not validate_indices is set"

OPS = (
    Op("gather", _gather_wrapping, "x indices", "native"),
    Op("gather", _gather_in_bounds, "x indices", "native", since=17, note=BOUNDS),
    Op("gather_along_axis", _along_wrapping, "x indices", "native"),
    Op("gather_along_axis", _along_in_bounds, "x indices", "native", since=17, note=BOUNDS),
    Op("gather_nd", _nd_wrapping, "x indices", "native"),
    Op("gather_nd", _nd_in_bounds, "x indices", "native", since=17, note=BOUNDS),
    Op("select", _select, "cond a b", "native", alike="a b"),
)
