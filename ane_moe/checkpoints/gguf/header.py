"""Reads the header of a GGUF file, trusting nothing in it.

Format: magic, version, counts, metadata, descriptions of tensors, then their bytes, each tensor at
a multiple of the alignment (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

import math
import struct
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from ane_moe.checkpoints.gguf.blocks import TYPES, Rows
from ane_moe.checkpoints.stored_tensor import StoredTensor
from ane_moe.checkpoints.weight_file import WeightFile, opened
from ane_moe.errors import UserError
from ane_moe.half import STORED
from ane_moe.lfs import FETCH, is_lfs_pointer

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # of the same layout
MAX_HEADER_BYTES = 1 << 28  # a vocabulary of a million tokens is a tenth of it
MAX_NAME_BYTES = 1 << 10  # ggml's own limit is 64 for a tensor
MAX_DIMENSIONS = 4  # ggml's own limit
MAX_ALIGNMENT = 1 << 20
BUFFER = 1 << 16  # bytes of the header that are read at once
STRING, ARRAY = 8, 9
# Of one number each, by their numbers in gguf.h.
NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}


@dataclass(frozen=True)
class GgufFile:
    """`metadata` by its keys: numbers, truth values, strings, lists of strings, arrays of numbers.
    `tensors` have the file's own names."""

    path: WeightFile
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


class _Damaged(Exception):
    """What was found."""


class _Header:
    """Reads a header from its start, never beyond the file's end or MAX_HEADER_BYTES."""

    def __init__(self, stream: "BufferedReader[Any]", file_bytes: int):
        self._stream, self._left = stream, min(file_bytes, MAX_HEADER_BYTES)
        self.position = 0

    def take(self, count: int) -> bytes:
        self.require(count, 1)
        self._left -= count
        self.position += count
        return self._stream.read(count)

    def require(self, count: int, size: int) -> None:
        """Whether `count` things of at least `size` bytes can follow."""
        if count * size > self._left:
            raise _Damaged(f"a header that asks for {count * size} bytes where {self._left} are")

    def u32(self) -> int:
        return int(struct.unpack("<I", self.take(4))[0])

    def u64(self) -> int:
        return int(struct.unpack("<Q", self.take(8))[0])

    def text(self) -> str:
        return self.take(self.u64()).decode("utf-8", errors="surrogateescape")

    def name(self) -> str:
        length = self.u64()
        if not 0 < length <= MAX_NAME_BYTES:
            raise _Damaged(f"a name of {length} bytes")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise _Damaged("a name that is no text") from None

    def value(self) -> Any:
        kind = self.u32()
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self._array()
        return _plain(self._numbers(kind, 1)[0])

    def _array(self) -> Any:
        kind, count = self.u32(), self.u64()
        if kind != STRING:
            return self._numbers(kind, count)
        self.require(count, 8)
        return [self.text() for _ in range(count)]

    def _numbers(self, kind: int, count: int) -> np.ndarray:
        if kind not in NUMBERS:
            raise _Damaged(f"metadata of type {kind}")
        self.require(count, NUMBERS[kind].itemsize)
        return np.frombuffer(self.take(count * NUMBERS[kind].itemsize), NUMBERS[kind])


def read_gguf(file: WeightFile, placed: WeightFile | None = None) -> GgufFile:
    """The metadata of a GGUF file, and where its tensors lie: in it, or where it is `placed`.

    Raises UserError when the file is truncated, is no GGUF file, or describes tensors that overlap,
    leave gaps, reach past the end of the file or do not fit their blocks.
    """
    path = placed or file
    if isinstance(file, Path) and is_lfs_pointer(file):
        raise UserError(f"{path} is not a GGUF file", "a pointer of Git LFS", FETCH)
    try:
        with BufferedReader(opened(file), BUFFER) as stream:
            file_bytes = file.stat().st_size if isinstance(file, Path) else file.size
            return _read(path, _Header(stream, file_bytes), file_bytes)
    except OSError as error:
        raise UserError(f"{path} cannot be read", str(error)) from None
    except _Damaged as found:
        raise UserError(
            f"{path} is not a sound GGUF file", str(found), "download it again"
        ) from None


def _read(path: WeightFile, header: _Header, file_bytes: int) -> GgufFile:
    if header.take(4) != MAGIC:
        raise _Damaged("other bytes than GGUF at its start")
    version = header.u32()
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        raise _Damaged("big-endian numbers" if swapped else f"version {version}")
    count, keys = header.u64(), header.u64()
    header.require(keys, 13)  # a key without a letter, and a byte
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = header.name()
        if key in metadata:
            raise _Damaged(f"{key[:60]!r} given twice")
        metadata[key] = header.value()
    alignment = metadata.get("general.alignment", 32)
    if not (isinstance(alignment, int) and 0 < alignment <= MAX_ALIGNMENT):
        raise _Damaged(f"an alignment of {str(alignment)[:40]}")
    header.require(count, 32)
    described = [_described(header) for _ in range(count)]
    start = _aligned(header.position, alignment)
    tensors = _placed(path, described, start, alignment, file_bytes)
    return GgufFile(path, metadata, tensors)


Described = tuple[str, tuple[int, ...], int, int]


def _described(header: _Header) -> Described:
    """Name, shape, type and offset of one tensor. Dimensions are stored the fastest first."""
    name, dimensions = header.name(), header.u32()
    if dimensions not in range(1, MAX_DIMENSIONS + 1):
        raise _Damaged(f"tensor {name[:60]!r} of {dimensions} dimensions")
    shape = tuple(header.u64() for _ in range(dimensions))[::-1]
    kind, offset = header.u32(), header.u64()
    if kind not in TYPES:
        raise _Damaged(f"tensor {name[:60]!r} of the unknown type {kind}")
    if min(shape) < 1 or shape[-1] % TYPES[kind].block:
        whole = f"rows of whole blocks of {TYPES[kind].block}"
        raise _Damaged(f"tensor {name[:60]!r} as {TYPES[kind].name}{list(shape)}, without {whole}")
    return name, shape, kind, offset


def _placed(
    path: WeightFile, described: list[Described], start: int, alignment: int, file_bytes: int
) -> dict[str, StoredTensor]:
    """The tensors one after the other, as llama.cpp requires it."""
    tensors: dict[str, StoredTensor] = {}
    place = end = start
    for name, shape, kind, offset in described:
        if name in tensors:
            raise _Damaged(f"tensor {name[:60]!r} given twice")
        if start + offset != place:
            raise _Damaged(f"tensor {name[:60]!r} at byte {start + offset} instead of {place}")
        size = math.prod(shape) // TYPES[kind].block * TYPES[kind].size
        tensors[name] = _stored(name, path, shape, kind, place, size)
        end = place + size
        place = _aligned(end, alignment)
    if tensors and not end <= file_bytes <= place:
        state = "truncated" if file_bytes < end else "longer than its header says"
        raise _Damaged(f"{file_bytes} bytes instead of {end}: it is {state}")
    return tensors


def _stored(
    name: str, path: WeightFile, shape: tuple[int, ...], kind: int, offset: int, size: int
) -> StoredTensor:
    tensor = StoredTensor(name, path, TYPES[kind].name, shape, offset, size, made=True)
    if not TYPES[kind].decoded:
        return tensor
    codec = Rows(tensor, shape[-1])
    return StoredTensor(name, path, "F32", shape, offset, size, made=True, codec=codec)


def plain_rows(tensor: StoredTensor) -> StoredTensor:
    """The tensor with a codec, whichever way it is stored."""
    if tensor.codec is not None or tensor.dtype not in STORED:
        return tensor
    codec = Rows(tensor, tensor.shape[-1])
    where = (tensor.shape, tensor.offset, tensor.size)
    return StoredTensor(tensor.key, tensor.path, "F32", *where, made=True, codec=codec)


def _aligned(place: int, alignment: int) -> int:
    return -(-place // alignment) * alignment


def _plain(value: Any) -> Any:
    """A number of numpy as one of Python; a 32-bit one as what it was written from."""
    return float(str(value)) if isinstance(value, np.float32) else value.item()
