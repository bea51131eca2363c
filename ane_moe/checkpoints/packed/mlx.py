"""MLX's affine 2 to 8 bit and its MXFP4: a scale, and for affine an offset, for each run of a row.
Experts lie stacked, gate, up and down apart, under `switch_mlp`.

Source: `mlx.core.dequantize` and mlx-lm's `SwitchGLU`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ane_moe.checkpoints.coded import FP4, Codes, Scaled
from ane_moe.checkpoints.expert_stack import unstacked
from ane_moe.checkpoints.packed.group import Group, grid, groups
from ane_moe.checkpoints.stored_tensor import StoredTensor

NAME = "MLX"
SCALES, OFFSETS = "scales", "biases"
STACK = re.compile(r"(.+)\.switch_mlp\.(gate|up|down)_proj\.weight")


def plain(
    facts: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> Iterator[tuple[tuple[str, ...], dict[str, StoredTensor]]]:
    coded: set[str] = set()
    for group in groups(tensors, "weight", OFFSETS, needed=(SCALES,)):
        if group["weight"].dtype == "U32":
            coded.update(group.names)
            yield group.names, _unstacked(_plain(group, facts))
    for name, tensor in tensors.items():
        if name not in coded and STACK.fullmatch(name):
            yield (name,), _unstacked({name: tensor})


def _plain(group: Group, facts: Mapping[str, Any]) -> dict[str, StoredTensor]:
    packed, scales = group["weight"], group[SCALES]
    own = facts.get(group.base.removesuffix("."))
    size = (own if isinstance(own, dict) else facts).get("group_size", 64)
    whole = isinstance(size, int) and size > 0 and packed.shape[:-1] == scales.shape[:-1]
    columns = scales.shape[-1] * size if whole else 0
    bits = packed.shape[-1] * 32 // columns if columns else 0
    exact = columns and bits in range(2, 9) and packed.shape[-1] * 32 == columns * bits
    group.require(bool(exact), f"no whole groups of {size}")
    shape = (*packed.shape[:-1], columns)
    values, offsets = tuple(map(float, range(1 << bits))), None
    if OFFSETS in group.ends:
        offsets = grid(group, OFFSETS, shape)
    else:
        group.require(bits == 4 and scales.dtype == "U8", "scales without biases, and no MXFP4")
        values = FP4
    codes = Codes(packed, bits, columns, values)
    codec = Scaled(codes, grid(group, SCALES, shape), offsets=offsets)
    return group.plain("weight", codec, shape)


def _unstacked(plain: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """A stack of experts as tensors of their own; others as they are."""
    ((name, tensor),) = plain.items()
    found = STACK.fullmatch(name)
    if found is None or len(tensor.shape) != 3:
        return plain
    return unstacked(tensor, *found.groups())
