"""4-bit floats with an exponent for each 32 (OCP microscaling formats): gpt-oss.

Source: transformers' `convert_moe_packed_tensors`.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ane_moe.checkpoints.coded import FP4, Codes, Grid, Scaled, Turned
from ane_moe.checkpoints.packed.group import Group, groups
from ane_moe.checkpoints.stored_tensor import StoredTensor

NAME = "MXFP4"


def plain(
    facts: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> Iterator[tuple[tuple[str, ...], dict[str, StoredTensor]]]:
    for group in groups(tensors, "_blocks", needed=("_scales",)):
        yield group.names, _plain(group)


def _plain(group: Group) -> dict[str, StoredTensor]:
    """`[E, R, C / 32, 16]` bytes as `[E, C, R]` numbers: transformers' gpt-oss has its experts the
    other way round."""
    blocks, scales = group["_blocks"], group["_scales"]
    fits = len(blocks.shape) == 4 and blocks.dtype == scales.dtype == "U8"
    group.require(fits and blocks.shape[:-1] == scales.shape, "blocks and scales do not agree")
    experts, rows, across, half = blocks.shape
    columns = across * half * 2
    flat = StoredTensor(
        blocks.key,
        blocks.path,
        "U8",
        (experts * rows, columns // 2),
        blocks.offset,
        math.prod(blocks.shape),
    )
    codec = Scaled(Codes(flat, 4, columns, FP4), Grid(scales, across, 1, 2 * half))
    return group.plain("", Turned(codec, rows), (experts, columns, rows))
