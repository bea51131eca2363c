"""Writes the weight blob file ("MIL blob v2", see runtime/blob.py), byte for byte as coremltools'
own writer does.

That one copies every array, and takes sub-byte types an element at a time.
"""

import hashlib
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from ane_moe.mlprogram.blob import ALIGNMENT, BLOB_DTYPES, HEADER, METADATA, SENTINEL, VERSION
from ane_moe.mlprogram.storage import STORAGE, encode, stored_size

CODES = {name: code for code, name in BLOB_DTYPES.items()}
PIECE = 1 << 20  # bytes hashed and written while they are in the cache


class BlobWriter:
    """A blob file of `arrays` arrays being written; complete when it is closed without an error.
    Raises OSError when the disk is full, ValueError when it got more or fewer arrays.

    `sha256` is of what was written: nobody has to read it again.
    """

    def __init__(self, path: Path, arrays: int):
        self._file, self.sha256 = FileIO(path, "w"), hashlib.sha256()
        self._left, self._end = arrays, HEADER.size
        self._write(HEADER.pack(arrays, VERSION))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
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
        self._write(METADATA.pack(SENTINEL, CODES[type_], size, start, padding))
        self._write(data.data)
        self._end = -(-(start + size) // ALIGNMENT) * ALIGNMENT
        self._write(bytes(self._end - start - size))
        self._left -= 1
        return place

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        for first in range(0, len(view), PIECE):
            piece = view[first : first + PIECE]
            self.sha256.update(piece)
            while piece:
                piece = piece[self._file.write(piece) :]
