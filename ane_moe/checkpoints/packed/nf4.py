"""bitsandbytes' 4 bit: 16 numbers of its own, a scale for each run of a flattened matrix, and often
a code for each scale.

Source: `bitsandbytes.functional.dequantize_4bit`.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ane_moe.checkpoints.coded import Codes, real_numbers, stored_bytes, stored_numbers
from ane_moe.checkpoints.packed.group import Group, groups
from ane_moe.checkpoints.stored_tensor import Pieces, StoredTensor

NAME = "bitsandbytes 4 bit"
ABSMAX, CODE = "weight.absmax", "weight.quant_map"
NESTED, NESTED_CODE = "weight.nested_absmax", "weight.nested_quant_map"
STATE = "weight.quant_state.bitsandbytes__"


@dataclass(frozen=True)
class Flat:
    """Codes of a flattened matrix, with a scale for each `run` of them."""

    codes: Codes
    scales: StoredTensor
    run: int
    nested: StoredTensor | None
    nested_code: StoredTensor | None
    nested_run: int
    offset: float

    @property
    def columns(self) -> int:
        return self.codes.columns

    @property
    def together(self) -> int:
        return 1

    def rows(self, first: int, last: int) -> np.ndarray:
        start, end = first * self.columns, last * self.columns
        lowest, highest = start // self.run, -(-end // self.run)
        scales = self._scales(lowest, highest)
        which = np.arange(start, end) // self.run - lowest
        return self.codes.rows(first, last) * scales[which].reshape(last - first, -1)

    @property
    def pieces(self) -> Pieces:
        ones = replace(self.codes, values=(1.0,) * 16)
        # Runs begin and end at multiples of this in every row.
        width = math.gcd(self.run, self.columns)
        return Pieces(self.codes, self.codes.values, 1, width, replace(self, codes=ones))

    def _scales(self, first: int, last: int) -> np.ndarray:
        if self.nested is None or self.nested_code is None:
            return real_numbers(self.scales, first, last - first)
        codes = stored_numbers(self.scales, first, last - first)
        numbers = real_numbers(self.nested_code)[codes]
        coarse = real_numbers(self.nested)[np.arange(first, last) // self.nested_run]
        return numbers * coarse + np.float32(self.offset)


def plain(
    facts: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> Iterator[tuple[tuple[str, ...], dict[str, StoredTensor]]]:
    for kind in sorted({name.split(STATE)[1] for name in tensors if STATE in name}):
        needed = (ABSMAX, CODE, STATE + kind)
        for group in groups(tensors, "weight", NESTED, NESTED_CODE, needed=needed):
            yield group.names, _plain(group, group[STATE + kind])


def _plain(group: Group, state: StoredTensor) -> dict[str, StoredTensor]:
    try:
        said = json.loads(stored_bytes(state, 0, state.size).tobytes())
        rows, columns = map(int, said["shape"])
        run, nested_run = int(said["blocksize"]), int(said.get("nested_blocksize", 256))
        offset = float(said.get("nested_offset", 0.0))
    except (ValueError, KeyError, TypeError):
        raise group.wrong("a quant_state that cannot be read") from None
    codes, scales = group["weight"], group[ABSMAX]
    whole = rows > 0 and columns > 0 and columns % 2 == 0 and run > 0 and nested_run > 0
    group.require(whole and codes.size * 2 == rows * columns, "no matrix of its shape")
    group.require(scales.shape[0] == -(-rows * columns // run), "absmax does not fit the weights")
    nested = (scales.dtype == "U8") == (NESTED in group.ends and NESTED_CODE in group.ends)
    group.require(nested and group[CODE].shape == (16,), "no scales that can be read")
    values = tuple(map(float, real_numbers(group[CODE])))
    flat = StoredTensor(codes.key, codes.path, "U8", (codes.size,), codes.offset, codes.size)
    codec = Flat(
        Codes(flat, 4, columns, values, high_first=True),
        scales,
        run,
        group.get(NESTED),
        group.get(NESTED_CODE),
        nested_run,
        offset,
    )
    return group.plain("weight", codec, (rows, columns))
