"""The weight formats: each encodes a matrix `(rows, columns)`, rows being output channels.

What coremltools emits for the same formats and iOS 18 is what is emitted here, so that one reader
serves both.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np

from ane_moe.errors import UserError
from ane_moe.formats.encoded import Encoded, Expansion, Stored
from ane_moe.formats.palettes import assign, fit_palettes
from ane_moe.formats.scales import LEAST_SCALE, fp16_scale
from ane_moe.half import from_half, narrowed

CHUNK = 1 << 17  # elements of a matrix treated at a time: half a megabyte of fp32
CHUNK_OF_SUMS = 1 << 19  # the same, where a sum may depend on it
# The levels of Apple's on-device model (its 2025 foundation model report).
APPLE_LEVELS = (-1.5, -0.5, 0.5, 1.5)
INFINITE = 0x7C00
SAMPLE_SIDE = 64  # more rows and columns than any group or block has
TYPICAL_SIDE = 4096  # of the square matrix that stands for all
DEFAULT_GROUP = 16  # coremltools' guide: 8 or 16 output channels a palette

# Writes integers `(R, B, n)` and scales `(R, B)` of fp32 `(R, B, n)`.
Rounding = Callable[[np.ndarray, np.ndarray, np.ndarray], None]


@dataclass(frozen=True)
class Format:
    """Base of all formats: fp16, stored as it is.

    `rate` names the speed at which a chip works through weights of the format
    (benchmark/chips.toml).
    """

    rate: ClassVar[str] = "fp16"
    name: str = "fp16"

    def encode(self, weight: np.ndarray, moments: np.ndarray | None = None) -> Encoded | None:
        """Encode fp16 `(rows, columns)`; None stands for plain fp16.

        `moments` fp32 `(columns,)` are mean squares of the inputs, by which errors are weighted.
        Raises ValueError for NaN and Inf.
        """
        return None

    def sample(self) -> Encoded | None:
        """Some matrix in this format: of zeros, which need no fit, that may take torch."""
        return self.encode(np.zeros((SAMPLE_SIDE, SAMPLE_SIDE), np.float16))

    def stored_bytes(self, rows: int, columns: int) -> int:
        """Payload of a matrix of this shape in the weight file; no weights are needed."""
        return 2 * rows * columns

    @property
    def stored_arrays(self) -> int:
        """Arrays that an encoded matrix takes in the weight file."""
        return 1

    @property
    def leaves_engine(self) -> bool:
        """Whether one such matrix takes the whole model off the engine: its compiler fails (751K,
        on an M6: int4 in blocks, palettes of vectors)."""
        return False

    @property
    def bits_per_weight(self) -> float:
        """Bits of a weight, scales and palettes included, in a square matrix that stands for
        all."""
        return 8 * self.stored_bytes(TYPICAL_SIDE, TYPICAL_SIDE) / TYPICAL_SIDE**2


@dataclass(frozen=True)
class Linear(Format):
    """Symmetric integers with one fp16 scale for each row, or each `block` of a row."""

    rate: ClassVar[str] = "int8"
    bits: int = 8
    block: int = 0

    def encode(self, weight: np.ndarray, moments: np.ndarray | None = None) -> Encoded:
        rows, columns = _require_finite(weight)
        blocks = columns // self.columns_of_scale(columns)
        data, scale = np.empty((rows, columns), np.int8), np.empty((rows, blocks), np.float16)
        round_off = self._rounding(moments)
        for first, last in _row_chunks(rows, columns):
            w = from_half(weight[first:last]).reshape(last - first, blocks, -1)
            round_off(w, data[first:last].reshape(w.shape), scale[first:last])
        inputs = {
            "data": Stored(_conv(data), f"int{self.bits}"),
            "scale": Stored(_conv(scale), "fp16"),
        }
        return Encoded(
            (
                Expansion(
                    "constexpr_blockwise_shift_scale", inputs, (("fp16", (rows, columns, 1, 1)),)
                ),
            )
        )

    def stored_bytes(self, rows: int, columns: int) -> int:
        scales = rows * (columns // self.columns_of_scale(columns))
        return _packed(rows * columns, self.bits) + 2 * scales

    @property
    def stored_arrays(self) -> int:
        return 2  # data and scale

    @property
    def leaves_engine(self) -> bool:
        return self.block > 0

    def columns_of_scale(self, columns: int) -> int:
        """Columns of a row that share a scale."""
        return _divisor(columns, self.block) if self.block else columns

    def _rounding(self, moments: np.ndarray | None) -> Rounding:
        """How integers and scales are found: where errors are weighed, some of the largest weights
        may be cut off."""
        top = 2 ** (self.bits - 1) - 1
        if self.bits == 8 and moments is None:
            return partial(_rounded, top)
        from ane_moe.formats.integers import fit_integers  # torch, which int8 does without

        return partial(fit_integers, moments, top, self.bits < 8)


@dataclass(frozen=True)
class Palette(Format):
    """K-means palettes: one for each `group` of rows (0: one for all), of single weights or of
    vectors down the rows.

    `scaled` divides each row by its largest magnitude first, and gives it that as a scale.
    """

    rate: ClassVar[str] = "lut"
    bits: int = 4
    group: int = DEFAULT_GROUP
    vector: int = 1
    scaled: bool = False

    def encode(self, weight: np.ndarray, moments: np.ndarray | None = None) -> Encoded:
        rows, columns = _require_finite(weight)
        groups = rows // self.rows_of_palette(rows)
        if self.vector > 1:
            return self._vectors(weight, groups, moments)
        scale = _row_scale(weight) if self.scaled else None
        values = weight if scale is None else _divided(weight, scale)
        grouped = values.reshape(groups, -1)
        weights = None if moments is None else np.tile(moments, rows // groups)
        palettes = fit_palettes(grouped, 1 << self.bits, weights)
        indices = assign(grouped, palettes).reshape(rows, columns)
        if scale is not None:
            palettes = np.repeat(palettes, rows // groups, axis=0)  # each row's, times its scale
            scale = _least_squares(weight, indices, palettes, scale, moments)
        return _palettized(indices, palettes, scale, f"uint{self.bits}")

    def stored_bytes(self, rows: int, columns: int) -> int:
        vector = _divisor(self.rows_of_palette(rows), self.vector)
        palettes = rows if self.scaled else rows // self.rows_of_palette(rows)
        scales = 2 * rows if self.scaled else 0
        return (
            _packed(rows * columns // vector, self.bits)
            + 2 * palettes * vector * (1 << self.bits)
            + scales
        )

    @property
    def stored_arrays(self) -> int:
        return 3 if self.scaled else 2  # indices, palettes, scales

    @property
    def leaves_engine(self) -> bool:
        return self.vector > 1

    def rows_of_palette(self, rows: int) -> int:
        """Rows that share a palette: the largest divisor of all rows within the group size."""
        return _divisor(rows, self.group) if self.group else rows

    def _vectors(self, weight: np.ndarray, groups: int, moments: np.ndarray | None) -> Encoded:
        from ane_moe.formats.vector_palettes import assign_vectors, fit_vectors  # torch

        rows, columns = weight.shape
        length = _divisor(rows // groups, self.vector)
        vectors = weight.reshape(rows // length, length, columns).transpose(0, 2, 1)
        grouped = np.ascontiguousarray(vectors).reshape(groups, -1, length)
        weights = None if moments is None else np.tile(moments, (groups, rows // length // groups))
        palettes = fit_vectors(grouped, 1 << self.bits, weights)
        indices = assign_vectors(grouped, palettes).reshape(rows // length, columns)
        inputs = {
            "indices": Stored(_conv(indices), f"uint{self.bits}"),
            "lut": Stored(palettes.reshape(groups, 1, 1, 1, -1, length), "fp16"),
        }
        axis = {"vector_axis": 0} if length > 1 else {}
        return Encoded(
            (Expansion("constexpr_lut_to_dense", inputs, (("fp16", (rows, columns, 1, 1)),), axis),)
        )


@dataclass(frozen=True)
class FixedPalette(Format):
    """The four levels of Apple's 2-bit training, times one scale for each `group` of rows."""

    rate: ClassVar[str] = "lut"
    group: int = 1

    def encode(self, weight: np.ndarray, moments: np.ndarray | None = None) -> Encoded:
        rows, columns = _require_finite(weight)
        size = self.rows_of_scale(rows)
        scale, indices = np.empty(rows // size, np.float16), np.empty((rows, columns), np.uint8)
        step = max(1, CHUNK_OF_SUMS // (size * columns))
        m = np.ones(size * columns, np.float32) if moments is None else np.tile(moments, size)
        for first in range(0, len(scale), step):
            part = slice(first * size, min(first + step, len(scale)) * size)
            w = from_half(weight[part]).reshape(-1, size * columns)
            scale[first : first + step] = s = _two_level_scale(w, m)
            outer = (np.abs(w) >= from_half(s)[:, None]).view(np.uint8)  # 0.5 or 1.5
            negative = (w < 0).view(np.uint8)
            # Indices 3 and 2, mirrored, are 0 and 1.
            indices[part] = ((outer | 2) ^ (3 * negative)).reshape(-1, columns)
        levels = np.tile(np.array(APPLE_LEVELS, np.float16), (len(scale), 1))
        return _palettized(indices, levels, scale[:, None], "uint2")

    @property
    def stored_arrays(self) -> int:
        return 3  # indices, levels, scales

    def stored_bytes(self, rows: int, columns: int) -> int:
        return _packed(rows * columns, 2) + (2 + 2 * len(APPLE_LEVELS)) * (
            rows // self.rows_of_scale(rows)
        )

    def rows_of_scale(self, rows: int) -> int:
        """Rows that share a scale."""
        return _divisor(rows, self.group)


@dataclass(frozen=True)
class Sparse(Format):
    """The smallest `percent` of all weights set to zero and left out (0: those that are zero
    already), the others stored as fp16, int8 or palettes.

    Published speed is 1.55 to 1.64 times fp16's on an M1 (ane-guide, chapter 7): their
    bytes at fp16's rate say as much.
    """

    percent: int = 50
    rest: Format = Format()

    def sample(self) -> Encoded | None:
        return self.encode(np.ones((SAMPLE_SIDE, SAMPLE_SIDE), np.float16))  # zeros are left out

    def encode(self, weight: np.ndarray, moments: np.ndarray | None = None) -> Encoded:
        rows, columns = _require_finite(weight)
        kept = _kept(weight, self.percent)
        mask, dense = (
            Stored(_conv(kept.astype(np.uint8)), "uint1"),
            (("fp16", (rows, columns, 1, 1)),),
        )
        if isinstance(self.rest, Linear):
            (linear,) = self.rest.encode(weight, moments).expansions
            data, scale = linear.inputs["data"], linear.inputs["scale"]
            assert isinstance(data, Stored)
            values = Stored(data.values.reshape(rows, columns)[kept], data.type)
            inputs = {"data_mask": mask, "nonzero_data": values, "scale": scale}
            return _joined("constexpr_sparse_blockwise_shift_scale", inputs, dense)
        if isinstance(self.rest, Palette):
            groups = rows // self.rest.rows_of_palette(rows)
            grouped = weight.reshape(groups, -1)
            mass = kept.astype(np.float32) * (1 if moments is None else moments)
            palettes = fit_palettes(grouped, 1 << self.rest.bits, mass.reshape(groups, -1))
            indices = assign(grouped, palettes).reshape(rows, columns)[kept]
            inputs = {
                "indices_mask": mask,
                "indices_nonzero_data": Stored(indices, f"uint{self.rest.bits}"),
                "lut": Stored(palettes.reshape(groups, 1, 1, 1, -1, 1), "fp16"),
            }
            return _joined("constexpr_lut_to_sparse", inputs, dense)
        inputs = {"nonzero_data": Stored(weight[kept], "fp16"), "mask": mask}
        return Encoded((Expansion("constexpr_sparse_to_dense", inputs, dense),))

    @property
    def stored_arrays(self) -> int:
        return 1 + self.rest.stored_arrays  # the mask

    def stored_bytes(self, rows: int, columns: int) -> int:
        kept = rows * columns - rows * columns * self.percent // 100
        whole, plain = (
            self.rest.stored_bytes(rows, columns),
            _packed(rows * columns, _bits(self.rest)),
        )
        return _packed(rows * columns, 1) + _packed(kept, _bits(self.rest)) + whole - plain


AS_STORED = "as-stored"  # stands for the form of each matrix in the checkpoint (as_stored.py)
FORMATS: dict[str, Format] = {
    "fp16": Format(),
    AS_STORED: Format(AS_STORED),
    "int8": Linear("int8", bits=8),
    "int4-channel": Linear("int4-channel", bits=4),
    "apple2": FixedPalette("apple2"),
    **{f"lut{bits}": Palette(f"lut{bits}", bits=bits) for bits in (8, 6, 4, 3, 2)},
    **{f"int{bits}-block32": Linear(f"int{bits}-block32", bits, 32) for bits in (8, 4)},
}
OPTIONS = re.compile(
    r"(?:-g(?P<group>8|16|32)|-(?P<tensor>tensor))?(?:-v(?P<vector>2|4))?(?P<scaled>\+scale)?"
)


def parse_format(text: str) -> Format:
    """The format of a name such as `int8`, `lut4`, `lut4-g32`, `lut6-tensor`, `lut8-v4`,
    `lut4+scale`, `apple2-g16`, `sparse50+lut4` or `int4-block32`. Raises UserError for others."""
    name = text.strip()
    if found := re.fullmatch(r"sparse(\d{1,2})(?:\+(.+))?", name):
        rest = parse_format(found[2] or "fp16")
        extended = isinstance(rest, Palette) and (rest.vector > 1 or rest.scaled)
        blocks = isinstance(rest, Linear) and rest.block > 0
        if isinstance(rest, Sparse | FixedPalette) or rest.name == AS_STORED or extended or blocks:
            raise UserError(
                f"{rest.name} cannot be joined with sparsity",
                do="join fp16, int8, int4-channel or lut2-8",
            )
        return Sparse(name, percent=int(found[1]), rest=rest)
    base = re.match(rf"int\d(-channel|-block32)|apple2|{AS_STORED}|[a-z]+\d+", name)
    form = FORMATS.get(base[0]) if base else None
    options = OPTIONS.fullmatch(name[len(base[0]) :]) if base else None
    if (
        form is None
        or options is None
        or (not isinstance(form, Palette | FixedPalette) and name != form.name)
    ):
        raise UserError(
            "there is no such weight format",
            repr(text),
            f"formats: {', '.join(FORMATS)}, sparse50, "
            "sparse50+int8; palettes take -g8, -g32, -tensor, -v2, -v4 and +scale",
        )
    return _with_options(form, name, options)


def _with_options(form: Format, name: str, options: re.Match[str]) -> Format:
    group = 0 if options["tensor"] else int(options["group"]) if options["group"] else None
    vector, scaled = int(options["vector"] or 1), bool(options["scaled"])
    if isinstance(form, FixedPalette) and not (options["tensor"] or options["vector"] or scaled):
        return replace(form, name=name, group=form.group if group is None else group)
    if isinstance(form, Palette) and not (scaled and vector > 1):
        # A palette of vectors is large: one for the whole matrix.
        usual = form.group if vector == 1 else 0
        return replace(
            form, name=name, group=usual if group is None else group, vector=vector, scaled=scaled
        )
    if isinstance(form, Palette | FixedPalette):
        raise UserError(
            "these options of a palette do not go together", repr(name), "leave one out"
        )
    return form


def _palettized(
    indices: np.ndarray, palettes: np.ndarray, scale: np.ndarray | None, type_: str
) -> Encoded:
    """Palettes `(G, E)`; with scales `(G, 1)` they are scaled before the look-up, as coremltools
    writes it."""
    rows, columns = indices.shape
    lut, dense = (
        Stored(palettes.reshape(len(palettes), 1, 1, 1, -1, 1), "fp16"),
        (("fp16", (rows, columns, 1, 1)),),
    )
    stored = Stored(_conv(indices), type_)
    if scale is None:
        return Encoded(
            (Expansion("constexpr_lut_to_dense", {"indices": stored, "lut": lut}, dense),)
        )
    inputs = {
        "data": lut,
        "scale": Stored(scale.astype(np.float16).reshape(-1, 1, 1, 1, 1, 1), "fp16"),
    }
    scaled = Expansion("constexpr_blockwise_shift_scale", inputs, (("fp16", lut.values.shape),))
    return Encoded(
        (scaled, Expansion("constexpr_lut_to_dense", {"indices": stored, "lut": (0, 0)}, dense))
    )


def _joined(
    type_: str,
    inputs: dict[str, Stored | tuple[int, int]],
    dense: tuple[tuple[str, tuple[int, ...]], ...],
) -> Encoded:
    """A sparse form that another operation expands to fp16, then the zeros between."""
    mask = next(value for name, value in inputs.items() if name.endswith("mask"))
    nonzero = next(value for name, value in inputs.items() if "nonzero" in name)
    assert isinstance(mask, Stored) and isinstance(nonzero, Stored)
    outputs = (("uint1", mask.values.shape), ("fp16", nonzero.values.shape))
    last = Expansion("constexpr_sparse_to_dense", {"nonzero_data": (0, 1), "mask": (0, 0)}, dense)
    return Encoded((Expansion(type_, inputs, outputs), last))


def _rounded(top: int, w: np.ndarray, data: np.ndarray, scale: np.ndarray) -> None:
    """Write int8 `data` `(R, B, n)` and fp16 `scale` `(R, B)` of fp32 `w`, which is used up."""
    largest = np.maximum(w.max(2), -w.min(2))
    scale[...] = fp16_scale(largest * np.float32(1 / top), top)
    w /= from_half(scale)[:, :, None]
    np.rint(w, out=w)
    np.clip(w, -top, top, out=w)
    np.copyto(data, w, casting="unsafe")


def _two_level_scale(w: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """fp16 scales `(R,)` of fp32 `(R, n)`; torch, and its import, are not for zeros."""
    if not w.any():
        return np.full(len(w), LEAST_SCALE, np.float16)
    from ane_moe.formats.two_levels import two_level_scale

    return two_level_scale(w, moments)


def _row_scale(weight: np.ndarray) -> np.ndarray:
    """The largest magnitude of each row, fp16 `(rows, 1)`; 1 for a row of zeros."""
    largest = np.maximum(weight.max(1, keepdims=True), -weight.min(1, keepdims=True))
    return np.where(largest > 0, largest, np.float16(1))


def _divided(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    out = np.empty_like(weight)
    for first, last in _row_chunks(*weight.shape):
        out[first:last] = narrowed(from_half(weight[first:last]) / from_half(scale[first:last]))
    return out


def _least_squares(
    weight: np.ndarray,
    indices: np.ndarray,
    palettes: np.ndarray,
    scale: np.ndarray,
    moments: np.ndarray | None,
) -> np.ndarray:
    """Scales fp16 `(rows, 1)` of least error for the levels chosen; where that is none, the ones
    given."""
    fitted = np.empty(scale.shape, np.float32)
    for first, last in _row_chunks(*weight.shape):
        levels = np.take_along_axis(
            palettes[first:last], indices[first:last].astype(np.int64), 1
        ).astype(np.float32)
        weighted = levels if moments is None else levels * moments
        squares = (weighted * levels).sum(1, keepdims=True)
        products = (weighted * weight[first:last]).sum(1, keepdims=True)
        fitted[first:last] = np.divide(
            products, squares, out=scale[first:last].astype(np.float32), where=squares > 0
        )
    sound = (fitted > LEAST_SCALE) & (fitted <= 65504)
    return np.where(sound, fitted, scale).astype(np.float16)


def _kept(weight: np.ndarray, percent: int) -> np.ndarray:
    """bool `(rows, columns)`: all but the zeros, and but the smallest until `percent` of all are
    left out."""
    magnitudes = (weight.view(np.uint16) & 0x7FFF).reshape(-1)
    out = magnitudes.size * percent // 100
    if out <= int((magnitudes == 0).sum()):
        return (magnitudes != 0).reshape(weight.shape)
    limit = np.partition(magnitudes, out - 1)[out - 1]
    kept = magnitudes > limit
    level = np.flatnonzero(magnitudes == limit)  # equal magnitudes: the first ones go
    kept[level[out - int((magnitudes < limit).sum()) :]] = True
    return kept.reshape(weight.shape)


def _require_finite(weight: np.ndarray) -> tuple[int, int]:
    if weight.ndim != 2 or weight.dtype != np.float16:
        raise ValueError(f"a weight is fp16 (rows, columns), not {weight.dtype} {weight.shape}")
    for first, last in _row_chunks(*weight.shape):
        if (weight[first:last].view(np.uint16) & 0x7FFF).max(initial=0) >= INFINITE:
            raise ValueError("NaN or Inf cannot be encoded")
    return weight.shape[0], weight.shape[1]


def _row_chunks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(1, CHUNK // max(1, columns))
    return ((first, min(first + step, rows)) for first in range(0, rows, step))


def _conv(values: np.ndarray) -> np.ndarray:
    return values.reshape(*values.shape, 1, 1)


def _divisor(total: int, most: int) -> int:
    """The largest divisor of `total` that is at most `most`."""
    return next(size for size in range(min(most, total), 0, -1) if total % size == 0)


def _packed(count: int, bits: int) -> int:
    return (count * bits + 7) // 8


def _bits(form: Format) -> int:
    return form.bits if isinstance(form, Linear | Palette) else 16
