"""Weights of a stored expert as the fp16 numbers that a graph is given, in the memory that it is
given them in.

The rows are expanded as the reference runtime expands those of a package, with the same result: a
block at a time, which stays in the processor's caches.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ane_moe.expert_record import PLAIN, StoredArray, StoredWeight
from ane_moe.mlprogram.storage import STORAGE, decode
from ane_moe.runtime.reference.stored_rows import (
    Codes,
    OddCodes,
    Palettes,
    Rows,
    Scaled,
    Whole,
    mapped,
)

BLOCK_ELEMENTS = 1 << 18
STEP = 64  # a block begins at a multiple of so many rows, where codes of any bits begin at a byte
AS_TORCH = {"fp16": torch.float16, "int8": torch.int8}

Arrays = Mapping[str, StoredArray]


def expand(weight: StoredWeight, record: np.ndarray, out: np.ndarray) -> None:
    """Fill fp16 `out`, of the weight's shape, with what it is in `record`, uint8 of a whole one."""
    if weight.form == PLAIN:
        (array,) = weight.arrays
        out.reshape(-1).view(np.uint8)[:] = record[array.bytes]
        return
    source = ROWS[weight.form]({array.key: array for array in weight.arrays}, record)
    dense = torch.from_numpy(out.reshape(out.shape[0], -1))
    step = max(STEP, BLOCK_ELEMENTS // dense.shape[1] // STEP * STEP)
    with torch.inference_mode():
        for first, last in pairwise([*range(0, len(dense), step), len(dense)]):
            dense[first:last] = source.rows(first, last)


def _numbers(array: StoredArray, record: np.ndarray) -> Tensor:
    """An array of whole bytes, over the memory of the record."""
    return mapped(record[array.bytes]).view(AS_TORCH[array.type]).view(array.shape)


def _codes(array: StoredArray, record: np.ndarray) -> Codes | OddCodes:
    storage, raw = STORAGE[array.type], record[array.bytes]
    rows, columns = array.shape
    if 8 % storage.bits or columns * storage.bits % 8:
        return OddCodes(raw, storage, columns)
    return Codes(mapped(raw).view(rows, -1), storage.bits)


def _scaled(arrays: Arrays, record: np.ndarray) -> Rows:
    data = arrays["data"]
    rows: Rows
    if STORAGE[data.type].bits < 8:
        numbers = torch.arange(1 << STORAGE[data.type].bits).float()
        numbers[len(numbers) // 2 :] -= len(numbers)
        rows = Palettes(_codes(data, record), numbers.view(1, 1, -1), data.shape[0])
    else:
        rows = Whole(_numbers(data, record))
    return _blockwise(rows, data.shape[0], arrays, record)


def _scaled_levels(arrays: Arrays, record: np.ndarray) -> Rows:
    levels = _numbers(arrays["lut"], record).float()
    rows = _palettes(arrays["indices"], levels, record)
    return _blockwise(rows, arrays["indices"].shape[0], arrays, record)


def _blockwise(rows: Rows, count: int, arrays: Arrays, record: np.ndarray) -> Rows:
    """`count` rows, less the zero point and times the scale of their blocks."""
    scale, offset = _numbers(arrays["scale"], record), None
    if zeros := arrays.get("offset"):
        whole = decode(STORAGE[zeros.type], record[zeros.bytes], zeros.count)
        offset = torch.from_numpy(whole.reshape(zeros.shape))
    return Scaled(rows, scale, offset, count // len(scale), narrow=True)


def _palette(arrays: Arrays, record: np.ndarray) -> Rows:
    return _palettes(arrays["indices"], _numbers(arrays["lut"], record), record)


def _scaled_palette(arrays: Arrays, record: np.ndarray) -> Rows:
    lut, scale = _numbers(arrays["lut"], record), _numbers(arrays["scale"], record)
    alone = len(scale) == arrays["indices"].shape[0]
    if alone and torch.equal(lut, lut[:1].expand(lut.shape)):
        # No palette for each row is made where all are one, times the row's scale.
        return Scaled(_palettes(arrays["indices"], lut[:1], record), scale, None, 1, narrow=True)
    return _palettes(arrays["indices"], (lut.float() * scale.float()).half(), record)


def _palettes(indices: StoredArray, lut: Tensor, record: np.ndarray) -> Rows:
    """`lut` is `(Lo, entries)`, or `(Lo, Li, entries)` where columns have several."""
    height = indices.shape[0] // len(lut)
    return Palettes(_codes(indices, record), lut.view(len(lut), -1, lut.shape[-1]), height)


ROWS: dict[str, Callable[[Arrays, np.ndarray], Rows]] = {
    "scaled": _scaled,
    "palette": _palette,
    "scaled_palette": _scaled_palette,
    "scaled_levels": _scaled_levels,
}
