"""What a function accepts as its inputs, whichever runtime executes it.

Arrays of another numeric type are taken where the declared one holds each of their values: whole
numbers as floats and the other way round, as coremltools' own tests send them to Core ML. Floats
are cast from any width to any other, as Core ML does.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from ane_moe.errors import UserError
from ane_moe.mlprogram.program import Feature
from ane_moe.runtime.numpy_dtypes import FLOATS, NUMPY

PIXELS = (0, 255)  # of every colour layout but grayscale fp16, which is not bounded
UNBOUNDED = "grayscale fp16"

_CHANNELS = {"RGB": [0, 1, 2], "BGR": [2, 1, 0]}  # of a picture in the order red, green, blue


def check_inputs(
    features: Iterable[Feature], given: Mapping[str, np.ndarray], where: str
) -> dict[str, np.ndarray]:
    """The inputs that are given, by name: of the declared numpy type, or floats of any width.

    `where` names the function. Raises UserError for an unknown input, a missing one, and one that
    does not fit.
    """
    known = {feature.name: feature for feature in features}
    extra = sorted(given.keys() - known.keys())
    if extra:
        raise UserError(f"{where} has no input '{extra[0]}'", do=f"its inputs: {', '.join(known)}")
    needed = [name for name, feature in known.items() if feature.default is None]
    missing = [name for name in needed if name not in given]
    if missing:
        raise UserError(
            f"{where} needs input '{missing[0]}'",
            f"inputs: {', '.join(given) or 'none'}",
            f"it takes {type_text(known[missing[0]])}; "
            "`ane-moe run --seed 0` draws what is not given",
        )
    return {
        name: check_input(feature, given[name], f"input '{name}' of {where}")
        for name, feature in known.items()
        if name in given
    }


def check_input(feature: Feature, given: np.ndarray, where: str) -> np.ndarray:
    """One input as `check_inputs` gives it. Raises UserError where it does not fit."""
    array = np.asarray(given)
    if feature.kind == "image":
        array = _pixels(feature, array, where)
    if not shape_fits(feature, array.shape):
        raise UserError(
            f"{where} has the wrong shape",
            str(list(array.shape)),
            f"it takes {shape_text(feature)}",
        )
    return _converted(array, feature.type.dtype, where)


def shape_fits(feature: Feature, shape: tuple[int, ...]) -> bool:
    """Whether an array of `shape` is one that the feature declares."""
    if feature.shapes:
        return shape in feature.shapes
    ranges = feature.ranges
    if ranges is None:
        ranges = tuple((0, -1) if size is None else (size, size) for size in feature.type.shape)
    return len(shape) == len(ranges) and all(
        low <= size and (high < 0 or size <= high)
        for size, (low, high) in zip(shape, ranges, strict=True)
    )


def shape_text(feature: Feature) -> str:
    """The shapes that a feature takes, e.g. `[1, 8]`, `[1, 8] or [1, 4]` or `[1, 1..8]`."""
    if feature.shapes:
        return " or ".join(str(list(shape)) for shape in feature.shapes)
    if feature.ranges is None:
        return _listed("?" if size is None else str(size) for size in feature.type.shape)
    return _listed(
        str(low) if low == high else f"{low}..{'' if high < 0 else high}"
        for low, high in feature.ranges
    )


def type_text(feature: Feature) -> str:
    """What a feature takes: `fp16 [1, 8]`, `image RGB with pixels 0 to 255 of [1, 3, 8, 8]`."""
    if feature.kind != "image":
        return f"{feature.type.dtype} {shape_text(feature)}"
    return f"image {feature.layout}{pixel_text(feature)} of {shape_text(feature)}"


def pixel_text(feature: Feature) -> str:
    """The range of an image's pixels, empty where it has none."""
    return "" if feature.layout == UNBOUNDED else f" with pixels {PIXELS[0]} to {PIXELS[1]}"


def default_value(feature: Feature) -> np.ndarray:
    """What stands for an optional input that is not given: its default in every element."""
    shape = tuple(1 if size is None else size for size in feature.type.shape)
    return np.full(shape, feature.default, NUMPY[feature.type.dtype])


def _listed(sizes: Iterable[str]) -> str:
    return f"[{', '.join(sizes)}]"


def _pixels(feature: Feature, array: np.ndarray, where: str) -> np.ndarray:
    """Pixels in the program's shape; a picture of [height, width(, 3)] is brought into it."""
    if len(feature.type.shape) == 4 and array.ndim in (2, 3):
        if array.ndim == 3 and array.shape[2] == 3 and feature.layout in _CHANNELS:
            array = np.moveaxis(array, 2, 0)[_CHANNELS[feature.layout]][None]
        elif array.ndim == 2 and feature.layout.startswith("grayscale"):
            array = array[None, None]
    low, high = PIXELS
    if array.dtype.kind not in "fiu" or not array.size or feature.layout == UNBOUNDED:
        return array
    if not (low <= array.min() and array.max() <= high):
        raise UserError(
            f"{where} is an image",
            f"values from {array.min():g} to {array.max():g}",
            f"it takes pixels of {low} to {high}; a scale or bias is part of the program",
        )
    return array


def _converted(array: np.ndarray, wanted: str, where: str) -> np.ndarray:
    """`array` in the declared type where no value changes; floats are the runtime's to cast."""
    dtype = np.dtype(NUMPY[wanted])
    if array.dtype == dtype or (array.dtype.kind == "f" and wanted in FLOATS):
        return array
    if array.dtype.kind not in "fiu" or wanted == "bool":
        raise UserError(
            f"{where} has the wrong element type", str(array.dtype), _cast(wanted, dtype)
        )
    with np.errstate(all="ignore"):
        cast = array.astype(dtype)
        kept = (cast.astype(array.dtype) == array) & _within(array, dtype)
    if kept.all():
        return cast
    lost = array[~kept].flat[0]
    raise UserError(
        f"{where} has the wrong element type",
        f"{array.dtype}, with {lost} among its values",
        f"{_cast(wanted, dtype)} if that is meant",
    )


def _within(array: np.ndarray, dtype: np.dtype) -> np.ndarray | bool:
    """Which values an integer `dtype` can hold: a cast from beyond it gives anything."""
    if dtype.kind == "f":
        return True
    limits = np.iinfo(dtype)
    return (array >= limits.min) & (array <= limits.max)


def _cast(wanted: str, dtype: np.dtype) -> str:
    return f"it takes {wanted}: cast it with .astype(numpy.{dtype.name})"
