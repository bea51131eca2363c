"""Rows of a matrix as it is stored, expanded a block at a time to the numbers they stand for.

O = rows (output channels), I = columns (input channels), n = rows of a block. A block begins at a
multiple of 64 rows, so that elements of any number of bits begin at a byte.
"""

import math
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ane_moe.mlprogram.storage import Storage, decode


class Rows(Protocol):
    def rows(self, first: int, last: int) -> Tensor:
        """Rows `first` to `last`, `(n, I)`, in fp16 where that holds them, else in fp32: a view of
        the file, or of memory that the next rows in this thread take."""


_SCRATCH = threading.local()
# What rows of so many bytes are copied as.
ROW_FORMS = {4: torch.int32, 8: torch.int64, 16: torch.complex128}


def scratch(use: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for one `use` in this thread, holding what the last one left. Megabytes asked of the
    system anew cost more, in pages that it clears, than all that is done with them."""
    held: Tensor | None = getattr(_SCRATCH, use, None)
    count = math.prod(shape)
    if held is None or held.numel() < count:
        with torch.inference_mode(False):  # such tensors may be written to in either mode
            held = torch.empty(count, dtype=dtype)
        setattr(_SCRATCH, use, held)
    return held[:count].view(shape)


def widened(rows: Tensor) -> Tensor:
    """`rows` in fp32; may be of memory that the next ones in this thread take."""
    if rows.dtype is torch.float32:
        return rows
    return scratch("wide", tuple(rows.shape), torch.float32).copy_(rows)


@dataclass(frozen=True)
class Whole:
    """Elements of whole bytes: fp32, fp16 or, of what is scaled, integers `(O, I)`."""

    values: Tensor

    def rows(self, first: int, last: int) -> Tensor:
        return self.values[first:last]


@dataclass(frozen=True)
class Scaled:
    """`(data - offset) * scale`, rounded to fp16 where `narrow`. `scale` and `offset` are
    `(So, Si)`: a number for each block of O / So rows and I / Si columns."""

    data: Rows
    scale: Tensor
    offset: Tensor | None
    height: int  # O / So
    narrow: bool

    def rows(self, first: int, last: int) -> Tensor:
        y = widened(self.data.rows(first, last))
        blocks = y.view(len(y), self.scale.shape[1], -1)
        if self.offset is not None:
            blocks.sub_(self._along(self.offset, first, last))
        blocks.mul_(self._along(self.scale, first, last))
        return scratch("narrow", tuple(y.shape), torch.float16).copy_(y) if self.narrow else y

    def _along(self, values: Tensor, first: int, last: int) -> Tensor:
        """Those of some rows, fp32 `(n, Si, 1)`."""
        rows = slice(first, last) if self.height == 1 else torch.arange(first, last) // self.height
        return values[rows].float().unsqueeze(2)


@dataclass(frozen=True)
class Codes:
    """Whole numbers of 1, 2, 4 or 8 bits as they are packed: `raw (O, I * bits / 8)`, uint8."""

    raw: Tensor
    bits: int

    def bytes(self, first: int, last: int) -> Tensor:
        """The bytes of some rows."""
        return self.raw[first:last]


@dataclass(frozen=True)
class OddCodes:
    """Whole numbers of 3 or 6 bits, which lie across bytes; `raw` are the bytes of all of them."""

    raw: np.ndarray
    storage: Storage
    columns: int
    bits = 8  # of one, once taken apart

    def bytes(self, first: int, last: int) -> Tensor:
        """Some rows, a byte for each number."""
        count, bits = (last - first) * self.columns, self.storage.bits
        start = first * self.columns * bits // 8
        raw = self.raw[start : start + (count * bits + 7) // 8]
        return torch.from_numpy(decode(self.storage, raw, count)).view(-1, self.columns)


@dataclass(frozen=True)
class Palettes:
    """The numbers that `codes` stand for: `lut (Lo, Li, entries)`, a palette for each block of
    O / Lo rows and I / Li columns.

    A byte stands for all the numbers in it, so a table of 256 entries a palette expands it at once.
    """

    codes: Codes | OddCodes
    lut: Tensor
    height: int  # O / Lo

    def rows(self, first: int, last: int) -> Tensor:
        lowest, highest = first // self.height, (last - 1) // self.height + 1
        bits, across = self.codes.bits, self.lut.shape[1]
        each = 8 // bits
        digits = torch.arange(256).unsqueeze(1) >> (torch.arange(each) * bits)
        some = self.lut[lowest:highest].flatten(0, 1)
        some = F.pad(some, (0, (1 << bits) - some.shape[1]))
        table = some[:, digits & ((1 << bits) - 1)].flatten(0, 1)  # (palettes * 256, each)
        raw = self.codes.bytes(first, last)
        palette = ((torch.arange(first, last) // self.height - lowest) * across).unsqueeze(1)
        if across > 1:
            palette = palette + torch.arange(across).repeat_interleave(raw.shape[1] // across)
        index = scratch("index", tuple(raw.shape), torch.int32).copy_(raw)
        index.add_((palette * 256).int())
        use = "narrow" if table.dtype is torch.float16 else "wide"
        y = scratch(use, (index.numel(), each), table.dtype)
        _look_up(table, index.flatten(), y)
        return y.view(last - first, -1)


def _look_up(table: Tensor, index: Tensor, into: Tensor) -> None:
    """Fill `into` with rows of `table (N, 1, 2, 4 or 8)`, fp16 or fp32, taken as numbers of up to
    16 bytes: as rows of a few floats they would be copied one by one."""
    if table.shape[1] == 1:
        index = scratch("long_index", tuple(index.shape), torch.int64).copy_(index)
    else:
        form = ROW_FORMS[min(16, table.shape[1] * table.itemsize)]
        table, into = table.view(form), into.view(form)
    if table.shape[1] == 1:
        table, into = table.flatten(), into.flatten()
    torch.index_select(table, 0, index, out=into)


@dataclass(frozen=True)
class Made:
    """Of any other form: all rows, expanded by the operations that the program names."""

    make: Callable[[], Tensor]

    def rows(self, first: int, last: int) -> Tensor:
        return self.make()[first:last]


def mapped(array: np.ndarray) -> Tensor:
    """A read-only array as a tensor over the same memory, which nothing writes to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once that it cannot be written to
        return torch.from_numpy(array)
