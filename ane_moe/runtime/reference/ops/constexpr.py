"""Compressed weights: expanded once, when a function first runs."""

import math

import torch
from torch import Tensor

from ane_moe.runtime.reference.dtypes import torch_dtype
from ane_moe.runtime.reference.ops.table import Kernel, Op


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` fields of `bits` bits in a row of bytes, least significant bit first, as
    int64."""
    planes = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    fields = planes.reshape(-1)[: count * bits].reshape(count, bits).to(torch.int64)
    return (fields << torch.arange(bits)).sum(1)


def _per_axis(values: Tensor, data: Tensor, axis: int) -> Tensor:
    """A scalar as it is; a vector along `axis` of `data`."""
    if values.dim() == 0 or values.numel() == 1:
        return values.reshape(())
    shape = [1] * data.dim()
    shape[axis] = values.numel()
    return values.reshape(shape)


def _affine_dequantize(axis: int) -> Kernel:
    def kernel(data: Tensor, zero_point: Tensor, scale: Tensor) -> Tensor:
        shift = _per_axis(zero_point, data, axis).float()
        return (data.float() - shift) * _per_axis(scale, data, axis)

    return kernel


def _per_block(values: Tensor, data: Tensor) -> Tensor:
    """`values` repeated over the blocks of `data` that its shape divides evenly."""
    for axis, (size, blocks) in enumerate(zip(data.shape, values.shape, strict=True)):
        if size % max(1, blocks):
            raise ValueError(f"{blocks} blocks do not divide axis {axis} of size {size}")
        if 1 < blocks < size:
            values = values.repeat_interleave(size // blocks, axis)
    return values


def _blockwise() -> Kernel:
    def kernel(data: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
        y = data.float()
        if offset is not None:
            y = y - _per_block(offset.float(), data)
        return y * _per_block(scale, data)

    return kernel


def _cast(output_dtype: str) -> Kernel:
    return lambda source: source.to(torch_dtype(output_dtype))


def _lut_packed(shape: list[int]) -> Kernel:
    def kernel(indices: Tensor, lut: Tensor) -> Tensor:
        bits = (lut.numel() - 1).bit_length()
        return lut[unpack_bits(indices, bits, math.prod(shape))].reshape(shape)

    return kernel


def lut_to_dense(indices: Tensor, lut: Tensor, vector_axis: int | None) -> Tensor:
    """Replaces each index by its palette's entry (a scalar, or a vector laid along `vector_axis`).

    The first dimensions of `lut` count the palettes along each axis of `indices`; then come entries
    and vector.
    """
    *groups, entries, vector = lut.shape
    which = torch.zeros((), dtype=torch.int64)
    for axis, (size, count) in enumerate(zip(indices.shape, groups, strict=True)):
        if size % count:
            raise ValueError(f"{count} palettes do not divide axis {axis} of size {size}")
        along = [1] * indices.dim()
        along[axis] = size
        which = which * count + (torch.arange(size) // (size // count)).reshape(along)
    dense = lut.reshape(-1, vector)[which * entries + indices.to(torch.int64)]  # [*indices, vector]
    if vector == 1:
        return dense.squeeze(-1)
    axis = (vector_axis or 0) % indices.dim()
    return dense.movedim(-1, axis + 1).flatten(axis, axis + 1)


def _lut_grouped(vector_axis: int | None = None) -> Kernel:
    return lambda indices, lut: lut_to_dense(indices, lut, vector_axis)


def _scatter_mask(nonzero: Tensor, mask: Tensor) -> Tensor:
    where = mask.to(torch.bool)
    if int(where.sum()) != nonzero.numel():
        raise ValueError(
            f"the mask has {int(where.sum())} set bits for {nonzero.numel()} stored elements"
        )
    dense = torch.zeros(mask.shape, dtype=nonzero.dtype)
    dense[where] = nonzero.reshape(-1)
    return dense


def _sparse_packed(shape: list[int]) -> Kernel:
    return lambda nonzero, mask: _scatter_mask(
        nonzero, unpack_bits(mask, 1, math.prod(shape)).reshape(shape)
    )


def _sparse() -> Kernel:
    return _scatter_mask


def _lut_to_sparse(vector_axis: int | None = None) -> Kernel:
    def kernel(mask: Tensor, nonzero: Tensor, lut: Tensor) -> tuple[Tensor, Tensor]:
        dense = lut_to_dense(_scatter_mask(nonzero, mask), lut, vector_axis)
        wide = mask if lut.shape[-1] == 1 else mask.repeat_interleave(lut.shape[-1], vector_axis)
        return wide, dense[wide.to(torch.bool)]

    return kernel


def _sparse_blockwise() -> Kernel:
    blockwise = _blockwise()

    def kernel(
        mask: Tensor, nonzero: Tensor, scale: Tensor, offset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        dense = blockwise(_scatter_mask(nonzero, mask), scale, offset)
        return mask, dense[mask.to(torch.bool)]

    return kernel


OPS = (
    Op(
        "constexpr_affine_dequantize",
        _affine_dequantize,
        "quantized_data zero_point scale",
        since=16,
    ),
    Op("constexpr_cast", _cast, "source_val", "native", since=16),
    Op(
        "constexpr_lut_to_dense",
        _lut_packed,
        "indices lut",
        "native",
        since=16,
        note="packed indices, one palette",
    ),
    Op(
        "constexpr_lut_to_dense",
        _lut_grouped,
        "indices lut",
        "native",
        since=18,
        note="grouped and vector palettes",
    ),
    Op(
        "constexpr_sparse_to_dense",
        _sparse_packed,
        "nonzero_data mask",
        "native",
        since=16,
        note="packed mask",
    ),
    Op("constexpr_sparse_to_dense", _sparse, "nonzero_data mask", "native", since=18),
    Op(
        "constexpr_lut_to_sparse",
        _lut_to_sparse,
        "indices_mask indices_nonzero_data lut",
        "native",
        since=18,
    ),
    Op(
        "constexpr_sparse_blockwise_shift_scale",
        _sparse_blockwise,
        "data_mask nonzero_data scale offset?",
        since=18,
    ),
    Op("constexpr_blockwise_shift_scale", _blockwise, "data scale offset?", since=18),
)
