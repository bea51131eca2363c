"""Scatters: writing by index. Every form comes down to positions in the flattened data."""

import math

import torch
from torch import Tensor

from ane_moe.runtime.reference.ops.indexing import BOUNDS, wrap
from ane_moe.runtime.reference.ops.table import Kernel, Maker, Op

REDUCE = {"add": "sum", "sub": "sum", "mul": "prod", "div": "prod", "max": "amax", "min": "amin"}


def _strides(shape: torch.Size) -> list[int]:
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def _combine(data: Tensor, where: Tensor, updates: Tensor, mode: str) -> Tensor:
    """`data` with `updates` combined at the flat positions `where`; of equal positions the last
    update wins."""
    flat, where, updates = data.flatten().clone(), where.flatten(), updates.flatten()
    if mode == "update":
        flat[where] = updates
    elif mode == "div":
        divisor = torch.ones_like(flat).scatter_reduce(0, where, updates, "prod")
        flat = (
            flat / divisor
            if flat.is_floating_point()
            else torch.div(flat, divisor, rounding_mode="trunc")
        )
    else:
        flat = flat.scatter_reduce(0, where, -updates if mode == "sub" else updates, REDUCE[mode])
    return flat.reshape(data.shape)


def _scatter(negative: bool, axis: int, mode: str) -> Kernel:
    def kernel(data: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        at = axis % data.dim()
        chosen = wrap(indices, data.shape[at], negative)
        positions = (
            torch.arange(data.numel()).reshape(data.shape).index_select(at, chosen.flatten())
        )
        return _combine(data, positions, updates, mode)

    return kernel


def _along(negative: bool, axis: int, mode: str) -> Kernel:
    def kernel(data: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        positions = torch.arange(data.numel()).reshape(data.shape)
        return _combine(
            data, positions.gather(axis, wrap(indices, data.shape[axis], negative)), updates, mode
        )

    return kernel


def _nd(negative: bool, mode: str) -> Kernel:
    def kernel(data: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        depth = indices.shape[-1]
        strides = _strides(data.shape)
        start = torch.zeros(indices.shape[:-1], dtype=torch.int64)
        for i in range(depth):
            start = start + wrap(indices[..., i], data.shape[i], negative) * strides[i]
        inner = torch.arange(math.prod(data.shape[depth:]))
        return _combine(data, start[..., None] + inner, updates, mode)

    return kernel


def _with_axis(form: Maker, negative: bool) -> Maker:
    if negative:
        return lambda axis=0, mode="add": form(True, axis, mode)
    return lambda axis=0, mode="add", validate_indices=False: form(False, axis, mode)


def _without_axis(negative: bool) -> Maker:
    if negative:
        return lambda mode="add": _nd(True, mode)
    return lambda mode="add", validate_indices=False: _nd(False, mode)


ARGUMENTS = "data indices updates"

OPS = tuple(
    Op(name, maker, ARGUMENTS, since=since, note="" if negative else BOUNDS)
    for since, negative in ((15, True), (17, False))
    for name, maker in (
        ("scatter", _with_axis(_scatter, negative)),
        ("scatter_along_axis", _with_axis(_along, negative)),
        ("scatter_nd", _without_axis(negative)),
    )
)
