"""Writes the weight blob file ("MIL blob v2", see runtime/blob.py), byte for byte as coremltools'
own writer does.

That one copies every array, and takes sub-byte types an element at a time.
"""

from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from ane_moe.hashed_file import HashedFile
from ane_moe.mlprogram.blob import ALIGNMENT, BLOB_DTYPES, HEADER, METADATA, SENTINEL, VERSION
from ane_moe.mlprogram.storage import STORAGE, encode, stored_size

CODES = {name: code for code, name in BLOB_DTYPES.items()}


class BlobWriter:
    """A blob file of `arrays` arrays being written; complete when it is closed without an error.
    Raises OSError when the disk is full, ValueError when it got more or fewer arrays.
    """

    def __init__(self, path: Path, arrays: int):
        self._file = HashedFile(path)
        self._left, self._end = arrays, HEADER.size
        self._file.write(HEADER.pack(arrays, VERSION))

    @property
    def sha256(self) -> str:
        """Hex, once it is closed."""
        return self._file.sha256

    def __enter__(self) -> Self:
        self._file.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.__exit__(kind, error, trace)
        if error is None and self._left:
            raise ValueError(f"{self._left} arrays fewer were written than announced")

    def add(self, values: np.ndarray, type_: str) -> int:
        """Append one array of the given storage type (sub-byte integers unpacked); the offset of
        its metadata."""
        storage = STORAGE[type_]
        data = encode(storage, values)
        place, size = self._end, stored_size(storage, values.size)
        padding = size * 8 - values.size * storage.bits if storage.bits < 8 else 0
        start = place + METADATA.size
        self._file.write(METADATA.pack(SENTINEL, CODES[type_], size, start, padding))
        self._file.write(data.data)
        self._end = -(-(start + size) // ALIGNMENT) * ALIGNMENT
        self._file.write(bytes(self._end - start - size))
        self._left -= 1
        return place
