"""Reads .npz files that are not trusted."""

import math
import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def read_npz(path: Path, max_bytes: int) -> dict[str, np.ndarray]:
    """The arrays in a file of at most `max_bytes` unpacked. Raises OSError where it cannot be read,
    ValueError where it is no such file, is larger, or has an array that is not as large as its
    header says: numpy asks for the memory first."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
            if size > max_bytes:
                raise ValueError(f"too large: {size} bytes unpacked, more than {max_bytes}")
            for entry in archive.infolist():
                _require_honest(archive, entry)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError) as error:
        raise ValueError(str(error) or type(error).__name__) from None


def _require_honest(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    with archive.open(entry) as stream:
        version = npy.read_magic(stream)
        if version not in HEADERS:
            raise ValueError(f"{entry.filename} is of format {version}")
        shape, _, dtype = HEADERS[version](stream)
        told, found = math.prod(shape) * dtype.itemsize, entry.file_size - stream.tell()
    if told != found or dtype.hasobject:
        raise ValueError(f"{entry.filename} holds {found} bytes, its header says {dtype} {shape}")
