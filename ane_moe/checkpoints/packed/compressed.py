"""compressed-tensors' whole numbers and 4-bit floats (llm-compressor, Kimi K2), and ModelOpt's
NVFP4.

Source: compressed-tensors' `PackedQuantizationCompressor`, `NaiveQuantizationCompressor`,
`NVFP4PackedCompressor` and `MXFP4PackedCompressor`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ane_moe.checkpoints.coded import FP4, SIGNED, Codes, PackedZeros, Scaled, stored_numbers
from ane_moe.checkpoints.packed.group import Group, grid, groups
from ane_moe.checkpoints.stored_tensor import StoredTensor

NAME = "compressed-tensors"
PACKED, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"
ZERO, ORDER, GLOBAL = "weight_zero_point", "weight_g_idx", "weight_global_scale"
MODELOPT_GLOBAL = "weight_scale_2"


def plain(
    facts: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> Iterator[tuple[tuple[str, ...], dict[str, StoredTensor]]]:
    for group in groups(tensors, PACKED, ZERO, ORDER, needed=(SCALE, SHAPE)):
        yield group.names, _whole_numbers(group)
    for group in groups(tensors, PACKED, GLOBAL, needed=(SCALE,)):
        if group[PACKED].dtype == "U8":
            yield group.names, _floats(group, PACKED)
    for group in groups(tensors, "weight", MODELOPT_GLOBAL, needed=(SCALE,)):
        if group["weight"].dtype == "U8":
            yield group.names, _floats(group, "weight")
    for group in groups(tensors, "weight", ZERO, needed=(SCALE,)):
        if group["weight"].dtype == "I8":
            yield group.names, _bytes(group)


def _whole_numbers(group: Group) -> dict[str, StoredTensor]:
    packed = group[PACKED]
    shape = tuple(int(size) for size in stored_numbers(group[SHAPE]))
    fits = len(shape) == len(packed.shape) == 2 and packed.dtype == "I32"
    group.require(fits and shape[0] == packed.shape[0] and shape[1] > 0, "no matrix of its shape")
    rows, columns = shape
    bits = packed.shape[1] * 32 // columns
    group.require(bits in range(1, 9), f"{bits} bits a weight")
    middle = 1 << (bits - 1)
    codes = Codes(packed, bits, columns, tuple(float(n - middle) for n in range(1 << bits)))
    order = group.get(ORDER)
    zeros = None
    scales = grid(group, SCALE, shape, order)
    if ZERO in group.ends:
        stored = group[ZERO]
        needed = (-(-rows * bits // 32), scales.across)
        group.require(stored.shape == needed, "zero points do not fit the scales")
        zeros = PackedZeros(type(scales)(stored, scales.across, 1, scales.width, order), bits, rows)
    return group.plain("weight", Scaled(codes, scales, zeros), shape)


def _bytes(group: Group) -> dict[str, StoredTensor]:
    shape = group["weight"].shape
    zeros = grid(group, ZERO, shape) if ZERO in group.ends else None
    codes = Codes(group["weight"], 8, shape[-1], SIGNED)
    return group.plain("weight", Scaled(codes, grid(group, SCALE, shape), zeros), shape)


def _floats(group: Group, end: str) -> dict[str, StoredTensor]:
    """Two 4-bit floats in a byte; bytes for scales are exponents (MXFP4)."""
    shape = (*group[end].shape[:-1], 2 * group[end].shape[-1])
    codec = Scaled(
        Codes(group[end], 4, shape[-1], FP4),
        grid(group, SCALE, shape),
        factor=group.get(MODELOPT_GLOBAL),
        divisor=group.get(GLOBAL),
    )
    return group.plain("weight", codec, shape)
