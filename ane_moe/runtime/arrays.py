"""Arrays in files: inputs of a run, its outputs, and random inputs where none are given."""

import json
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from ane_moe.errors import UserError
from ane_moe.files import replaced
from ane_moe.mlprogram.program import Feature
from ane_moe.runtime.inputs import PIXELS, UNBOUNDED
from ane_moe.runtime.numpy_dtypes import NUMPY


def read_inputs(assignments: Iterable[str]) -> dict[str, np.ndarray]:
    """`name=file.npy` pairs as arrays. Raises UserError for a pair that is none and a file that is
    no plain array."""
    inputs = {}
    for assignment in assignments:
        name, _, path = assignment.partition("=")
        if not name or not path:
            raise UserError("an input is given as NAME=FILE.npy", found=assignment)
        inputs[name] = read_array(Path(path))
    return inputs


def read_array(path: Path) -> np.ndarray:
    """The array in a .npy file; files holding Python objects are refused."""
    try:
        return np.load(path, allow_pickle=False, mmap_mode="r")
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path} is no .npy file of numbers", str(error).split("\n")[0]) from None


def random_inputs(features: Iterable[Feature], seed: int) -> dict[str, np.ndarray]:
    """Seeded inputs of the declared (default) shapes: normal floats, integers of 0 and 1, pixels.

    Inputs with a default are left out. Raises UserError for one whose type is not a number's.
    """
    rng = np.random.default_rng(seed)
    return {feature.name: _drawn(feature, rng) for feature in features if feature.default is None}


def _drawn(feature: Feature, rng: np.random.Generator) -> np.ndarray:
    dtype = NUMPY.get(feature.type.dtype)
    if dtype is None:
        raise UserError(
            f"input '{feature.name}' cannot be made up", feature.type.dtype, "give it with --input"
        )
    shape = tuple(1 if size is None else size for size in feature.type.shape)
    if feature.kind == "image" and feature.layout != UNBOUNDED:
        low, high = PIXELS
        return np.asarray(rng.integers(low, high + 1, shape), dtype)
    if np.issubdtype(dtype, np.floating):
        return np.asarray(rng.standard_normal(shape), dtype)
    return np.asarray(rng.integers(0, 2, shape), dtype)


def save_arrays(folder: Path, arrays: Mapping[str, np.ndarray]) -> list[Path]:
    """Write each array as `<name>.npy` into `folder`, made if absent; characters unfit for a file
    name become `_`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{_file_name(name)}.npy" for name in arrays]
    if len(set(paths)) != len(paths):
        raise UserError("two outputs would be written to one file", ", ".join(arrays))
    for path, array in zip(paths, arrays.values(), strict=True):
        _replace(path, partial(_save, array=array))
    return paths


def numbers_of(results: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The results that are numbers: arrays, and a classifier's probabilities, fp64 `[classes]`."""
    numbers = {}
    for name, value in results.items():
        if isinstance(value, dict):
            numbers[name] = np.array(list(value.values()), np.float64)
        elif isinstance(value, np.ndarray):
            numbers[name] = value
    return numbers


def labels_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results that hold labels: a classifier's likeliest one, and the probability of each."""
    return {name: value for name, value in results.items() if not isinstance(value, np.ndarray)}


def save_labels(folder: Path, labels: Mapping[str, Any]) -> None:
    """Write what `labels_of` gives as `labels.json` into `folder`, made if absent."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(labels, indent=2, ensure_ascii=False)
    _replace(folder / "labels.json", lambda file: file.write(f"{text}\n".encode()))


def save_archive(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write all arrays into one compressed .npz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, partial(_archive, arrays=arrays))


def _save(file: IO[bytes], array: np.ndarray) -> None:
    np.save(file, array)


def _archive(file: IO[bytes], arrays: Mapping[str, np.ndarray]) -> None:
    with zipfile.ZipFile(
        file, "w", zipfile.ZIP_DEFLATED
    ) as archive:  # np.savez reserves some names
        for name, array in arrays.items():
            with archive.open(f"{_file_name(name)}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name).lstrip(".") or "_"


def _replace(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    with replaced(path) as temporary, temporary.open("wb") as file:
        write(file)
