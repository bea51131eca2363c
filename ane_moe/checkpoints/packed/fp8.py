"""8-bit floats with a scale for each block, row or tensor: DeepSeek's and Qwen's checkpoints, and
those of ModelOpt and compressed-tensors.

Source: transformers' `Fp8Dequantize`, compressed-tensors' `FloatQuantizationCompressor`.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ane_moe.checkpoints.coded import TABLES, Codes, Scaled
from ane_moe.checkpoints.packed.group import Group, grid, groups
from ane_moe.checkpoints.stored_tensor import StoredTensor

NAME = "FP8"
SCALES = ("_scale_inv", "_scale")


def plain(
    facts: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> Iterator[tuple[tuple[str, ...], dict[str, StoredTensor]]]:
    block = facts.get("weight_block_size")
    for end in ("weight", "gate_up_proj", "down_proj"):
        for scale in SCALES:
            for group in groups(tensors, end, needed=(end + scale,)):
                if group[end].dtype in ("F8_E4M3", "F8_E5M2"):
                    yield group.names, _plain(group, end, end + scale, block)


def _plain(group: Group, end: str, scale: str, block: Any) -> dict[str, StoredTensor]:
    codes, shape = group[end], group[end].shape
    scales = grid(group, scale, shape)
    if isinstance(block, list) and len(block) == 2 and math.prod(group[scale].shape) > 1:
        # A last block that is cut short leaves it open how large the others are.
        rows, columns = shape[-2:]
        sizes = (min(block[0], rows), min(block[1], columns))
        cells = (-(-rows // sizes[0]), -(-columns // sizes[1]))
        group.require(cells == group[scale].shape[-2:], f"no blocks of {block}")
        scales = type(scales)(scales.tensor, scales.across, *sizes)
    codec = Scaled(Codes(codes, 8, shape[-1], TABLES[codes.dtype]), scales)
    return group.plain(end, codec, shape)
