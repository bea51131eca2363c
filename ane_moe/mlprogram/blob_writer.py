"""Writes the weight blob file ("MIL blob v2", see runtime/blob.py), byte for byte as coremltools'
own writer does.

That one copies every array, and takes sub-byte types an element at a time.
"""

from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from ane_moe.mlprogram.blob import ALIGNMENT, BLOB_DTYPES, HEADER, METADATA, SENTINEL, VERSION
from ane_moe.mlprogram.storage import STORAGE, encode, stored_size

CODES = {name: code for code, name in BLOB_DTYPES.items()}


class BlobWriter:
    """A blob file being written; complete when it is closed without an error. Raises OSError when
    the disk is full."""

    def __init__(self, path: Path):
        self._file = FileIO(path, "w")
        self._file.write(HEADER.pack(0, VERSION))
        self._count, self._end = 0, HEADER.size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file:
            if error is None:
                self._file.seek(0)
                self._write(HEADER.pack(self._count, VERSION))

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
        self._count += 1
        return place

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
