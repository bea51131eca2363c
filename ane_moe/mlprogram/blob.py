"""The weight blob file ("MIL blob v2"): where large constants lie.

Layout, after coremltools' mlmodel/src/MILBlob/Blob/StorageFormat.hpp: a 64-byte header, then pairs
of 64-byte metadata and data, each starting at a multiple of 64. The program refers to a constant by
the offset of its metadata.
"""

import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ane_moe.errors import UserError
from ane_moe.mlprogram.storage import Storage, decode, stored_size

ALIGNMENT = 64
SENTINEL = 0xDEADBEEF
VERSION = 2
MAX_RESIDENT_BYTES = 64 << 20  # of the mapped file; what is read beyond it pushes earlier pages out
HEADER = struct.Struct("<II56x")  # number of blobs, version
METADATA = struct.Struct("<IIQQQ32x")  # sentinel, type, size in bytes, data offset, padding in bits

BLOB_DTYPES = {
    1: "fp16",
    2: "fp32",
    3: "uint8",
    4: "int8",
    5: "bf16",
    6: "int16",
    7: "uint16",
    8: "int4",
    9: "uint1",
    10: "uint2",
    11: "uint4",
    12: "uint3",
    13: "uint6",
    14: "int32",
    15: "uint32",
    16: "fp8e4m3fn",
    17: "fp8e5m2",
}

_REPAIR = "the package is damaged or was cut short: download or convert it again"


@dataclass(frozen=True)
class BlobEntry:
    """One stored constant, its metadata checked against the file."""

    storage: Storage
    count: int
    offset: int  # of the data, in bytes
    nbytes: int


class BlobFile:
    """A blob file, mapped into memory on the first `read`; `entry` reads 64 bytes and maps
    nothing."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = open(path, "rb")  # noqa: SIM115 - kept open for as long as the constants are in use
        except OSError as error:
            raise UserError(
                f"cannot read {path.name}", str(error.strerror), "check the permissions"
            ) from None
        self._size = os.fstat(self._file.fileno()).st_size
        self._map: mmap.mmap | None = None
        self._resident = 0
        if self._size < HEADER.size:
            raise UserError(
                f"weight file {path.name} has no header", f"{self._size} bytes", _REPAIR
            )
        _, version = HEADER.unpack(os.pread(self._file.fileno(), HEADER.size, 0))
        if version != VERSION:
            raise UserError(
                f"weight file {path.name} is not of format version 2", f"version {version}", _REPAIR
            )

    def entry(self, metadata_offset: int, storage: Storage, count: int) -> BlobEntry:
        """Check the metadata at `metadata_offset` against the declared type and number of
        elements."""
        where = f"constant at offset {metadata_offset} of {self.path.name}"
        if (
            metadata_offset % ALIGNMENT
            or not HEADER.size <= metadata_offset <= self._size - METADATA.size
        ):
            raise UserError(
                f"{where} does not lie on a metadata slot", f"a file of {self._size} bytes", _REPAIR
            )
        sentinel, code, nbytes, offset, padding = METADATA.unpack(
            os.pread(self._file.fileno(), METADATA.size, metadata_offset)
        )
        if sentinel != SENTINEL:
            raise UserError(
                f"{where} has no metadata", f"sentinel {sentinel:#x} for {SENTINEL:#x}", _REPAIR
            )
        if code not in BLOB_DTYPES:
            raise UserError(f"{where} has an unknown storage type", f"code {code}", _REPAIR)
        if BLOB_DTYPES[code] != storage.name:
            raise UserError(
                f"{where} is not stored as the program declares it",
                f"{BLOB_DTYPES[code]} for {storage.name}",
                _REPAIR,
            )
        if nbytes != stored_size(storage, count):
            raise UserError(
                f"{where} does not have the declared size",
                f"{nbytes} bytes for {count} elements of {storage.name}",
                _REPAIR,
            )
        if storage.bits < 8 and padding != nbytes * 8 - count * storage.bits:
            raise UserError(
                f"{where} has wrong padding",
                f"{padding} bits for {count} of {storage.name}",
                _REPAIR,
            )
        if offset % ALIGNMENT or offset < HEADER.size or offset + nbytes > self._size:
            raise UserError(
                f"data of {where} lies outside the file",
                f"{nbytes} bytes at {offset} in a file of {self._size} bytes",
                _REPAIR,
            )
        return BlobEntry(storage, count, offset, nbytes)

    def read(self, entry: BlobEntry) -> np.ndarray:
        """The elements, one axis. Whole-byte types are read-only views of the file, the others
        fresh arrays.

        Views stay valid for good, but their pages may be handed back to the system and fault in
        again when used.
        """
        raw = self.raw(entry)
        if self._map is not None and self._resident > MAX_RESIDENT_BYTES:
            self._map.madvise(mmap.MADV_DONTNEED)
            self._resident = 0
        self._resident += entry.nbytes
        return decode(entry.storage, raw, entry.count)

    def raw(self, entry: BlobEntry) -> np.ndarray:
        """The stored bytes, a read-only view of the file: the system reads its pages when they are
        used, and takes them back when memory is short."""
        if entry.nbytes == 0:
            return np.empty(0, np.uint8)
        if self._map is None:
            try:
                self._map = mmap.mmap(self._file.fileno(), self._size, access=mmap.ACCESS_READ)
            except (
                OSError,
                ValueError,
            ) as error:  # no address space left, or cut short since it was opened
                raise UserError(
                    f"weight file {self.path.name} cannot be mapped", str(error)
                ) from None
        return np.frombuffer(self._map, np.uint8, entry.nbytes, entry.offset)
