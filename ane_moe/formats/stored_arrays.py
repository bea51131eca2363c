"""What arrays a matrix becomes in each weight format, before there is a matrix: what a store of
experts is laid out by, since all records of it have one size."""

from collections.abc import Callable

from ane_moe.errors import UserError
from ane_moe.formats.as_stored import AsStored
from ane_moe.formats.encoders import APPLE_LEVELS, AS_STORED, FixedPalette, Format, Linear, Palette
from ane_moe.formats.recipe import find_format

Array = tuple[str, str, tuple[int, ...]]  # what it is, storage type, shape
Form = tuple[str, tuple[Array, ...]]
KNOWN = "fp16, int8, int4-channel, int8-block32, lut2 to lut8, apple2, or as-stored of codes"


def stored_arrays(name: str, rows: int, columns: int) -> Form:
    """The form of a matrix `(rows, columns)` in the format called `name`, and its arrays in the
    order in which `Format.encode` gives them. Raises UserError for formats whose arrays depend on
    the numbers, and for those that the host does not expand."""
    form = find_format(name)
    found = next((make for kind, make in FORMS if type(form) is kind), None)
    vectors = isinstance(form, Palette) and form.vector > 1
    if found is None or vectors or name == AS_STORED:
        raise UserError(
            "a store of experts does not hold this weight format", name, f"give {KNOWN}"
        )
    return found(form, rows, columns)


def _plain(form: Format, rows: int, columns: int) -> Form:
    return "fp16", (("values", "fp16", (rows, columns)),)


def _linear(form: Linear, rows: int, columns: int) -> Form:
    scales = columns // form.columns_of_scale(columns)
    data = ("data", f"int{form.bits}", (rows, columns))
    return "scaled", (data, ("scale", "fp16", (rows, scales)))


def _palette(form: Palette, rows: int, columns: int) -> Form:
    palettes, entries = rows // form.rows_of_palette(rows), 1 << form.bits
    indices = ("indices", f"uint{form.bits}", (rows, columns))
    if not form.scaled:
        return "palette", (indices, ("lut", "fp16", (palettes, entries)))
    arrays = ("lut", "fp16", (rows, entries)), ("scale", "fp16", (rows, 1)), indices
    return "scaled_palette", arrays


def _fixed(form: FixedPalette, rows: int, columns: int) -> Form:
    palettes = rows // form.rows_of_scale(rows)
    levels = ("lut", "fp16", (palettes, len(APPLE_LEVELS)))
    scale = ("scale", "fp16", (palettes, 1))
    return "scaled_palette", (levels, scale, ("indices", "uint2", (rows, columns)))


def _as_stored(form: AsStored, rows: int, columns: int) -> Form:
    down, across = rows // (form.height or rows), columns // (form.width or columns)
    scale, codes = ("scale", "fp16", (down, across)), (rows, columns)
    if form.kind == "int":
        offset = ("offset", f"int{form.bits}", (down, across))
        data = ("data", f"int{form.bits}", codes)
        return "scaled", (data, scale, *([offset] if form.zeros else []))
    indices, entries = ("indices", f"uint{form.bits}", codes), 1 << form.bits
    if form.kind == "lut":
        return "palette", (indices, ("lut", "fp16", (down, across, entries)))
    levels = ("lut", "int8" if form.kind == "level" else "fp16", (1, entries))
    return "scaled_levels", (indices, levels, scale)


FORMS: tuple[tuple[type, Callable[..., Form]], ...] = (
    (Format, _plain),
    (Linear, _linear),
    (Palette, _palette),
    (FixedPalette, _fixed),
    (AsStored, _as_stored),
)
