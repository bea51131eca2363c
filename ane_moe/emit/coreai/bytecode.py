"""The named arrays of an asset's program, read without Apple's parser.

main.mlirb is MLIR's bytecode (https://mlir.llvm.org/docs/BytecodeFormat): sections, one of them the
strings, one the arrays ("resources") and one their names and sizes. Nothing else is read here.
"""

import mmap
from pathlib import Path

import numpy as np

from ane_moe.errors import UserError

MAGIC = b"ML\xefR"
STRINGS, RESOURCES, OFFSETS = 0, 5, 6
ALIGNED = 0x80  # of a section's id: what lies in it begins at a multiple
BLOB = 0  # the kind of a resource that is an array
DO = "the asset is damaged: convert again"


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """uint8 views of the file by the names of the arrays. Raises UserError for what is no
    bytecode."""
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        sections = _sections(_Reader(memoryview(data)))
        return _arrays(*(sections[name] for name in (STRINGS, OFFSETS, RESOURCES)))
    except (OSError, IndexError, KeyError, ValueError) as error:
        raise UserError(f"{path} cannot be read", f"{type(error).__name__}: {error}", DO) from None


class _Reader:
    """A place in bytes. Raises IndexError at their end."""

    def __init__(self, data: memoryview, place: int = 0):
        self.data, self.place = data, place

    @property
    def more(self) -> bool:
        return self.place < len(self.data)

    def byte(self) -> int:
        self.place += 1
        return self.data[self.place - 1]

    def number(self) -> int:
        """A varint: as many low zeros in the first byte as bytes follow it."""
        first = self.byte()
        if first & 1:
            return first >> 1
        if first == 0:
            return int.from_bytes(self.take(8), "little")
        more = (first & -first).bit_length() - 1
        return (int.from_bytes(self.take(more), "little") << 8 | first) >> (more + 1)

    def take(self, size: int) -> memoryview:
        if size > len(self.data) - self.place:
            raise IndexError("it ends too soon")
        self.place += size
        return self.data[self.place - size : self.place]

    def align(self, size: int) -> None:
        """`size` is of the file; so every part of it that is read begins at a multiple, too."""
        if size < 1:
            raise ValueError("an alignment of 0")
        self.place += -self.place % size


def _sections(reader: _Reader) -> dict[int, _Reader]:
    """Readers of the whole file, each at the start of a section and ending with it."""
    if bytes(reader.take(len(MAGIC))) != MAGIC:
        raise ValueError("no MLIR bytecode")
    reader.number()  # the version
    while reader.byte():  # who made it
        pass
    found = {}
    while reader.more:
        kind, length = reader.byte(), reader.number()
        if kind & ALIGNED:
            reader.align(reader.number())
        end = reader.place + length
        if end > len(reader.data):
            raise IndexError("it ends too soon")
        found[kind & ~ALIGNED] = _Reader(reader.data[:end], reader.place)
        reader.place = end
    return found


def _strings(reader: _Reader) -> list[str]:
    """Their lengths come first, the last one's before the others', each with a zero at its end."""
    lengths = [reader.number() for _ in range(reader.number())]
    return [bytes(reader.take(length))[:-1].decode() for length in reversed(lengths)]


def _arrays(strings: _Reader, offsets: _Reader, resources: _Reader) -> dict[str, np.ndarray]:
    names, found = _strings(strings), {}
    for _ in range(offsets.number()):  # of no dialect: none that we know of
        raise ValueError("resources of an unknown kind")
    while offsets.more:
        offsets.number()  # of which dialect
        for _ in range(offsets.number()):
            name, size, kind = names[offsets.number()], offsets.number(), offsets.byte()
            end = resources.place + size
            if kind == BLOB:
                alignment, length = resources.number(), resources.number()
                resources.align(alignment)
                found[name] = np.frombuffer(resources.take(length), np.uint8)
            resources.place = end
    return found
