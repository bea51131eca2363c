"""Weights that are stored as small codes, decoded to fp32 while they are read.

R rows and C columns are those of the matrix that is meant; a stack of matrices is their rows one
below the other. Arithmetic is fp32, in the order of the libraries that write such files.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ane_moe.checkpoints.stored_tensor import Codec, Pieces, StoredTensor
from ane_moe.checkpoints.weight_file import opened, read_exactly
from ane_moe.half import widened

DECODED_ELEMENTS = 1 << 20  # decoded at a time, where rows allow it
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4 = (*E2M1, *(-value for value in E2M1))

RAW: dict[str, np.dtype[Any]] = {
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F32": np.dtype("<f4"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "F8_E8M0": np.dtype("u1"),
}


def float8(exponent_bits: int) -> tuple[float, ...]:
    """The numbers of the 256 codes of an 8-bit float: E4M3 without infinities, and E5M2 (OCP 8-bit
    floating point specification 1.0)."""
    mantissa_bits = 7 - exponent_bits
    bias, steps = 2 ** (exponent_bits - 1) - 1, 2**mantissa_bits
    values = []
    for code in range(128):
        exponent, fraction = code >> mantissa_bits, code % steps / steps
        if exponent == 0:
            values.append(fraction * 2.0 ** (1 - bias))
        else:
            values.append((1 + fraction) * 2.0 ** (exponent - bias))
    if exponent_bits == 4:
        values[127] = math.nan
    else:
        values[124:] = [math.inf, math.nan, math.nan, math.nan]
    return (*values, *(-value for value in values))


E4M3, E5M2 = float8(4), float8(5)
E8M0 = (*(2.0 ** (code - 127) for code in range(255)), math.nan)
SIGNED = tuple(map(float, (*range(128), *range(-128, 0))))
TABLES = {"F8_E4M3": E4M3, "F8_E5M2": E5M2, "F8_E8M0": E8M0, "U8": E8M0}


def stored_bytes(tensor: StoredTensor, first: int, count: int) -> np.ndarray:
    """Bytes [first, first + count) of a tensor. Raises UserError where the file ends."""
    stored = np.empty(count, np.uint8)
    with opened(tensor.path) as stream:
        stream.seek(tensor.offset + first)
        read_exactly(stream, stored, tensor.path)
    return stored


def stored_numbers(tensor: StoredTensor, first: int = 0, count: int | None = None) -> np.ndarray:
    """`count` elements of a tensor, flat, as they are stored."""
    kind = RAW[tensor.dtype]
    count = math.prod(tensor.shape) - first if count is None else count
    return stored_bytes(tensor, first * kind.itemsize, count * kind.itemsize).view(kind)


def real_numbers(tensor: StoredTensor, first: int = 0, count: int | None = None) -> np.ndarray:
    """The same as fp32. Bytes are exponents, as in the OCP microscaling formats."""
    numbers = stored_numbers(tensor, first, count)
    if tensor.dtype in TABLES:
        return np.asarray(TABLES[tensor.dtype], np.float32)[numbers]
    return widened(numbers, tensor.dtype)


def unpacked(rows: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Codes of `bits` bits, `(n, columns)`, out of rows of bytes in which they lie without gaps,
    lowest bits first."""
    if bits == 8:
        return rows[:, :columns]
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        codes = (rows[:, :, None] >> shifts) & ((1 << bits) - 1)
        return codes.reshape(len(rows), -1)[:, :columns]
    single = np.unpackbits(rows, axis=1, count=columns * bits, bitorder="little")
    weights = (1 << np.arange(bits)).astype(np.uint8)
    return single.reshape(len(rows), columns, bits) @ weights


@dataclass(frozen=True)
class Codes:
    """A matrix of codes of `bits` bits, the lowest bits first (`high_first`: of two in a byte, the
    upper), each row from a byte of its own; `values` is the number that each means."""

    tensor: StoredTensor
    bits: int
    columns: int
    values: tuple[float, ...]
    high_first: bool = False
    together: int = 1
    pieces: None = None

    def rows(self, first: int, last: int) -> np.ndarray:
        width = -(-self.columns * self.bits // 8)
        if len(self.tensor.shape) > 1:
            width = self.tensor.size // math.prod(self.tensor.shape[:-1])
        stored = stored_bytes(self.tensor, first * width, (last - first) * width)
        rows = stored.reshape(last - first, width)
        if self.bits == 4:  # a byte is two numbers at once: the common case, and the fastest
            return np.take(self._pairs(), rows).view(np.float32)[:, : self.columns]
        codes = unpacked(rows, self.bits, self.columns)
        return np.take(np.asarray(self.values, np.float32), codes)

    def _pairs(self) -> np.ndarray:
        """The two numbers of each byte, as one element of 8 bytes."""
        each = np.asarray(self.values, np.float32)
        low, high = np.tile(each, 16), np.repeat(each, 16)
        pairs = np.stack([high, low] if self.high_first else [low, high], axis=1)  # (256, 2)
        return pairs.view(np.uint64)[:, 0]


@dataclass(frozen=True)
class Grid:
    """A number for each block of a matrix, `height` rows high and `width` columns wide, `across`
    of them side by side. With `order` it says itself which block a column belongs to."""

    tensor: StoredTensor
    across: int
    height: int
    width: int
    order: StoredTensor | None = None

    @property
    def alike(self) -> tuple[int, int]:
        """Rows and columns with one number."""
        if self.order is not None:
            return self.height, 1
        return self.height, 0 if self.across == 1 else self.width

    def rows(self, first: int, last: int, columns: int) -> np.ndarray:
        """The number of each element of rows [first, last)."""
        above, below = first // self.height, (last - 1) // self.height + 1
        numbers = real_numbers(self.tensor, above * self.across, (below - above) * self.across)
        return self.spread(numbers.reshape(below - above, self.across), first, last, columns)

    def spread(self, blocks: np.ndarray, first: int, last: int, columns: int) -> np.ndarray:
        """`blocks` begin with those of the row `first`."""
        chosen = blocks[np.arange(first, last) // self.height - first // self.height]
        if self.order is not None:
            return chosen[:, stored_numbers(self.order)]
        if self.across == 1:
            return chosen
        return np.repeat(chosen, self.width, axis=1)[:, :columns]


@dataclass(frozen=True)
class PackedZeros:
    """The zero points of a Grid as codes of `bits` bits, which lie along its columns."""

    grid: Grid
    bits: int
    height: int  # rows that are meant

    def rows(self, first: int, last: int, columns: int) -> np.ndarray:
        words = stored_numbers(self.grid.tensor).reshape(-1, self.grid.across)
        across = np.ascontiguousarray(words.T).view(np.uint8)  # (blocks, bytes)
        codes = unpacked(across, self.bits, self.height).astype(np.float32).T
        centred = codes[first:last] - np.float32(1 << (self.bits - 1))
        return self.grid.spread(centred, 0, last - first, columns)


@dataclass(frozen=True)
class Spread:
    """The number of each element of a matrix that has one for each block, times or divided by one
    for all."""

    of: Grid | PackedZeros
    columns: int
    factor: StoredTensor | None = None
    divisor: StoredTensor | None = None
    together: int = 1
    pieces: None = None

    def rows(self, first: int, last: int) -> np.ndarray:
        numbers = self.of.rows(first, last, self.columns)
        if self.factor is not None:
            numbers = numbers * real_numbers(self.factor)
        if self.divisor is not None:
            numbers = numbers / real_numbers(self.divisor)
        return np.broadcast_to(numbers, (last - first, self.columns))


@dataclass(frozen=True)
class Scaled:
    """`(code - zero) * scale + offset`, each scale, zero and offset of a block of the matrix."""

    codes: Codes
    scales: Grid
    zeros: Grid | PackedZeros | None = None
    offsets: Grid | None = None
    factor: StoredTensor | None = None  # multiplies all scales
    divisor: StoredTensor | None = None  # divides all scales
    together: int = 1

    @property
    def columns(self) -> int:
        return self.codes.columns

    def rows(self, first: int, last: int) -> np.ndarray:
        numbers = self.codes.rows(first, last)
        if self.zeros is not None:
            numbers = numbers - self.zeros.rows(first, last, self.columns)
        numbers = numbers * self._scales.rows(first, last)
        if self.offsets is not None:
            numbers = numbers + self.offsets.rows(first, last, self.columns)
        return numbers

    @property
    def _scales(self) -> Spread:
        return Spread(self.scales, self.columns, self.factor, self.divisor)

    @property
    def pieces(self) -> Pieces:
        whole = Pieces(self.codes, self.codes.values, *self.scales.alike)
        if self.offsets is not None:
            return whole
        zeros = None if self.zeros is None else Spread(self.zeros, self.columns)
        return replace(whole, scales=self._scales, zeros=zeros)


@dataclass(frozen=True)
class Turned:
    """A stack of matrices, each of `height` stored rows, with rows and columns changed."""

    inner: Codec
    height: int

    @property
    def columns(self) -> int:
        return self.height

    @property
    def together(self) -> int:
        return self.inner.columns

    def rows(self, first: int, last: int) -> np.ndarray:
        experts = range(first // self.together, last // self.together)
        matrices = [self.inner.rows(e * self.height, (e + 1) * self.height).T for e in experts]
        return np.concatenate(matrices)

    @property
    def pieces(self) -> Pieces | None:
        inner = self.inner.pieces
        if inner is None:
            return None
        turned = inner.through(lambda codec: Turned(codec, self.height))
        return replace(turned, height=inner.width, width=inner.height)


@dataclass(frozen=True)
class Part:
    """Rows of a codec from `start` on."""

    inner: Codec
    start: int

    @property
    def columns(self) -> int:
        return self.inner.columns

    @property
    def together(self) -> int:
        return self.inner.together

    def rows(self, first: int, last: int) -> np.ndarray:
        return self.inner.rows(self.start + first, self.start + last)

    @property
    def pieces(self) -> Pieces | None:
        inner = self.inner.pieces
        return inner and inner.through(lambda codec: Part(codec, self.start))


def decoded(codec: Codec, start: int, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """(first element, numbers) of each piece of the elements [start, start + count)."""
    unit = codec.columns * codec.together
    step = max(1, DECODED_ELEMENTS // unit) * unit
    for begin in range(start // unit * unit, start + count, step):
        end = min(begin + step, -(-(start + count) // unit) * unit)
        rows = codec.rows(begin // codec.columns, end // codec.columns).reshape(-1)
        wanted = rows[max(start - begin, 0) : start + count - begin]
        yield max(begin - start, 0), np.ascontiguousarray(wanted, np.float32)
