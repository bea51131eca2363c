"""Formats that take over the codes and scales of a quantised checkpoint as they are.

Each is named by how it holds them, the bits of a code, and how many rows and columns have one scale
or palette (`all` of them):

* `as-stored-int4-1x32`: whole numbers and scales (and, `-zeros`, zero points);
* `as-stored-level4-1x32`, `as-stored-real4-1x64`: one palette for all, of whole numbers or of fp16
  numbers, and scales after it (coremltools' joint form of the two);
* `as-stored-lut8-128x128`: palettes that have the scales in them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import numpy as np

from ane_moe.errors import UserError
from ane_moe.formats.encoded import Encoded, Expansion, Stored
from ane_moe.formats.encoders import AS_STORED, Format
from ane_moe.half import narrowed

NAME = re.compile(
    rf"{AS_STORED}-(int|level|real|lut)([23468])(-zeros)?-(\d+|all)x(\d+|all)", re.ASCII
)
HALVES = 1 << 16  # fp16 numbers; of them all levels differ
SAMPLE = 2  # blocks of a sample matrix in either direction
PALETTE_BITS = (2, 3, 4, 6, 8)
FEW_BITS = 4  # up to so many, levels are apart from their scales

Kind = Literal["int", "level", "real", "lut"]


@dataclass(frozen=True)
class Codes:
    """A quantised matrix taken apart, each `(rows, columns)`, fp32: codes, the scale of each
    element, and its zero point where there are any. `values` are those that codes may have."""

    codes: np.ndarray
    values: Sequence[float]
    scales: np.ndarray | None = None
    zeros: np.ndarray | None = None


@dataclass(frozen=True)
class AsStored(Format):
    """Codes of `bits` bits; `height` rows and `width` columns (0: all) have one scale or
    palette."""

    rate: ClassVar[str] = "lut"
    kind: Kind = "int"
    bits: int = 4
    zeros: bool = False
    height: int = 1
    width: int = 0

    def encode(self, weight: np.ndarray, moments: np.ndarray | None = None) -> Encoded:
        raise ValueError(f"{self.name} is of codes, not of numbers")

    def carry(self, weight: np.ndarray, stored: Codes) -> Encoded:
        """The matrix `weight`, fp16 `(rows, columns)`, by the codes that it was decoded from.

        Palettes give just its numbers; scales are rounded to fp16 where they are finer. Raises
        ValueError for codes that are not of this form, and UserError for a zero point or a scale
        that has no place in it.
        """
        if self.kind == "lut":
            return self._palettes(weight, stored)
        assert stored.scales is not None
        step = _step(stored.values) if self.kind == "level" else 1.0
        scale = _conv(self._scale(stored.scales * np.float32(step)))
        if self.kind == "int":
            return self._whole_numbers(stored, scale)
        levels, indices = _indices(stored)
        lut = np.zeros(1 << self.bits, np.int8 if self.kind == "level" else np.float16)
        lut[: len(levels)] = levels / step
        return self._scaled_levels(indices, lut, scale)

    def sample(self) -> Encoded:
        rows, columns = (SAMPLE * (size or 1) for size in (self.height, self.width))
        zeros = np.zeros((rows, columns), np.float32)
        levels = np.arange(SAMPLE, dtype=np.float32).tolist()
        stored = Codes(zeros, levels, zeros + 1, zeros if self.zeros else None)
        return self.carry(zeros.astype(np.float16), stored)

    def stored_bytes(self, rows: int, columns: int) -> int:
        blocks = (rows // (self.height or rows)) * (columns // (self.width or columns))
        entries, codes = 1 << self.bits, (rows * columns * self.bits + 7) // 8
        if self.kind == "lut":
            return codes + 2 * entries * blocks
        palette = {"int": 0, "level": entries, "real": 2 * entries}[self.kind]
        zeros = (blocks * self.bits + 7) // 8 if self.zeros else 0
        return codes + palette + 2 * blocks + zeros

    @property
    def stored_arrays(self) -> int:
        return 2 if self.kind == "lut" or (self.kind == "int" and not self.zeros) else 3

    @property
    def leaves_engine(self) -> bool:
        return self.kind != "lut" and self.width > 0

    def _whole_numbers(self, stored: Codes, scale: np.ndarray) -> Encoded:
        """Where there are zero points, codes count from the middle of what int4 and int8 hold."""
        middle = np.float32(0)
        if stored.zeros is not None:
            middle += np.float32(min(stored.values) + (1 << (self.bits - 1)))
        type_, low = f"int{self.bits}", -(1 << (self.bits - 1))
        inputs = {
            "data": Stored(_conv((stored.codes - middle).astype(np.int8)), type_),
            "scale": Stored(scale, "fp16"),
        }
        if stored.zeros is not None:
            zeros = self._one_a_block(stored.zeros) - middle
            if zeros.min() < low or zeros.max() > -low - 1:
                raise _no_place(f"a zero point of {int(zeros.max() + middle)}")
            inputs["offset"] = Stored(_conv(zeros.astype(np.int8)), type_)
        return Encoded((_blockwise(inputs, stored.codes.shape),))

    def _scaled_levels(self, indices: np.ndarray, lut: np.ndarray, scale: np.ndarray) -> Encoded:
        shape = (*indices.shape, 1, 1)
        type_ = "int8" if self.kind == "level" else "fp16"
        inputs = {
            "indices": Stored(_conv(indices), f"uint{self.bits}"),
            "lut": Stored(lut.reshape(1, 1, 1, 1, -1, 1), type_),
        }
        looked_up = Expansion("constexpr_lut_to_dense", inputs, ((type_, shape),))
        scaled: dict[str, Stored | tuple[int, int]] = {"data": (0, 0)}
        scaled["scale"] = Stored(scale, "fp16")
        return Encoded((looked_up, _blockwise(scaled, indices.shape)))

    def _palettes(self, weight: np.ndarray, stored: Codes) -> Encoded:
        rows, columns = weight.shape
        _, indices = _indices(stored)
        down, across = self._block(rows, columns)
        which = (
            np.arange(rows)[:, None] // down * (columns // across) + np.arange(columns) // across
        )
        palettes = np.zeros((rows // down * (columns // across), 1 << self.bits), np.float16)
        palettes[which, indices] = weight
        if not np.array_equal(palettes[which, indices], weight):
            raise ValueError("a code means different numbers in one block")
        lut = palettes.reshape(rows // down, columns // across, 1, 1, -1, 1)
        inputs = {
            "indices": Stored(_conv(indices), f"uint{self.bits}"),
            "lut": Stored(lut, "fp16"),
        }
        outputs = (("fp16", (rows, columns, 1, 1)),)
        return Encoded((Expansion("constexpr_lut_to_dense", inputs, outputs),))

    def _scale(self, scales: np.ndarray) -> np.ndarray:
        narrow = narrowed(self._one_a_block(scales))
        if not np.isfinite(narrow).all():
            raise _no_place(f"a scale of {np.abs(scales).max():g}")
        return narrow

    def _one_a_block(self, numbers: np.ndarray) -> np.ndarray:
        """The number of each block, of one for each element."""
        rows, columns = numbers.shape
        down, across = self._block(rows, columns)
        blocks = numbers.reshape(rows // down, down, columns // across, across)
        single = blocks[:, :1, :, :1]
        if not np.array_equal(blocks, np.broadcast_to(single, blocks.shape)):
            raise ValueError("a block has more than one scale or zero point")
        return single[:, 0, :, 0]

    def _block(self, rows: int, columns: int) -> tuple[int, int]:
        return self.height or rows, self.width or columns


def parse_as_stored(name: str) -> AsStored | None:
    """The format of such a name; None of others."""
    found = NAME.fullmatch(name)
    if found is None:
        return None
    kind, bits, zeros, height, width = found.groups()
    sizes = (0 if size == "all" else int(size) for size in (height, width))
    return AsStored(name, cast(Kind, kind), int(bits), bool(zeros), *sizes)


def smallest(
    values: Sequence[float],
    shape: tuple[int, int],
    block: tuple[int, int],
    scaled: bool,
    zeros: bool,
) -> AsStored:
    """The format for codes of these `values`, with a scale for each `block` of `shape`; `scaled`:
    scales, and zero points where `zeros`, are all that turns codes into numbers."""
    levels = sorted({value for value in values if value == value})
    whole = tuple(0 if size == of else size for size, of in zip(block, shape, strict=True))
    bits = next(bits for bits in PALETTE_BITS if len(levels) <= 1 << bits)
    by_step = [level - levels[0] for level in levels] == list(range(len(levels)))
    if scaled and by_step and (zeros or levels[0] == -len(levels) / 2):
        kind: Kind = "int"
        bits = 4 if bits <= 4 else 8
    elif scaled and not zeros and bits <= FEW_BITS and whole[1]:
        kind = "level" if _step(levels) else "real"
    else:
        kind = "lut"
    sizes = "x".join(str(size or "all") for size in whole)
    name = f"{AS_STORED}-{kind}{bits}{'-zeros' if zeros and kind == 'int' else ''}-{sizes}"
    form = parse_as_stored(name)
    assert form is not None
    return form


def _step(values: Sequence[float]) -> float:
    """The largest power of two of which all values are multiples that int8 holds; 0 where there is
    none."""
    for step in (2.0, 1.0, 0.5, 0.25):
        multiples = [value / step for value in values if value == value]
        if all(n == int(n) and -128 <= n <= 127 for n in multiples):
            return step
    return 0.0


def _indices(stored: Codes) -> tuple[np.ndarray, np.ndarray]:
    """The levels there are, rising, and which of them each code is, uint8."""
    levels = np.unique(np.array([v for v in stored.values if v == v], np.float32)) + 0
    table = np.zeros(HALVES, np.uint8)  # a search takes ten times as long
    table[narrowed(levels).view(np.uint16)] = np.arange(len(levels))
    indices = table[narrowed(stored.codes + 0).view(np.uint16)]  # -0 is 0
    if not np.array_equal(levels[indices], stored.codes):
        raise ValueError("a code that is none of its levels")
    return levels, indices


def _blockwise(inputs: Mapping[str, Stored | tuple[int, int]], shape: tuple[int, ...]) -> Expansion:
    return Expansion("constexpr_blockwise_shift_scale", inputs, (("fp16", (*shape, 1, 1)),))


def _conv(values: np.ndarray) -> np.ndarray:
    return values.reshape(*values.shape, 1, 1)


def _no_place(found: str) -> UserError:
    return UserError(
        "it cannot be carried over as it is stored",
        found,
        "give its role another format in a recipe",
    )
