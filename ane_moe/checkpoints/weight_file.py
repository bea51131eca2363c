"""The bytes of a weight file: of this machine, or of a place that fsspec reads by ranges."""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ane_moe.addresses import file_system, remote_size, tried, unreadable
from ane_moe.checkpoints.hub_range import PROTOCOL, hub_range, hub_size
from ane_moe.errors import UserError

BLOCK, BLOCKS = 1 << 23, 6  # bytes of a request, and how many stay: neighbours are read next


@dataclass(frozen=True, order=True)
class RemoteFile:
    """A file of `size` bytes at an address that fsspec knows."""

    url: str
    size: int

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    def __str__(self) -> str:
        return self.url


WeightFile = Path | RemoteFile


def read_range(url: str, first: int, last: int) -> bytes:
    """Bytes [first, last) of a file. Raises UserError where they cannot be had."""
    if url.startswith(PROTOCOL):
        return hub_range(url, first, last)
    files, path = file_system(url)
    try:
        data = bytes(tried(lambda: files.cat_file(path, start=first, end=last)))
    except FileNotFoundError:
        raise UserError(f"there is no {url}") from None
    except Exception as error:  # of many libraries: network, permission
        raise unreadable(url, error) from None
    if len(data) != last - first:
        found = f"{len(data)} bytes where {last - first} were asked for"
        raise UserError(f"{url} is not given by ranges", found, "download it, and give the folder")
    return data


def weight_size(url: str) -> int | None:
    """As `remote_size`, of the Hub's files too."""
    return hub_size(url) if url.startswith(PROTOCOL) else remote_size(url)


def size_of(file: WeightFile) -> int | None:
    """Bytes of a file as it is there now; None where there is none."""
    if isinstance(file, Path):
        return file.stat().st_size if file.is_file() else None
    try:
        return weight_size(file.url)
    except UserError:
        return None


def opened(file: WeightFile) -> io.RawIOBase:
    """The file, to be sought in and read without another buffer."""
    return file.open("rb", buffering=0) if isinstance(file, Path) else _Blocks(file)


def forget(files: Iterable[WeightFile]) -> None:
    """Read anew what is at addresses from now on: another checkpoint may be there by now."""
    _block.cache_clear()
    for url in {file.url.rpartition("/")[0] for file in files if isinstance(file, RemoteFile)}:
        if not url.startswith(PROTOCOL):
            file_system(url)[0].invalidate_cache()


def read_exactly(stream: io.RawIOBase, raw: np.ndarray, file: WeightFile) -> None:
    """Fill an array of bytes. Raises UserError where the file ends."""
    view = raw.data
    while view:
        got = stream.readinto(view)
        if not got:
            raise UserError(f"{file} is truncated", "it ended while it was being read")
        view = view[got:]


class _Blocks(io.RawIOBase):
    """A file that is fetched block by block."""

    def __init__(self, file: RemoteFile):
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        assert whence == 0
        self._at = offset
        return offset

    def readinto(self, buffer: Any) -> int:
        if self._at >= self._file.size:
            return 0
        view, (number, first) = memoryview(buffer), divmod(self._at, BLOCK)
        piece = _block(self._file, number)[first : first + len(view)]
        view[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


@lru_cache(maxsize=BLOCKS)
def _block(file: RemoteFile, number: int) -> memoryview:
    """Tensors that lie beside each other come by one request."""
    first = number * BLOCK
    return memoryview(read_range(file.url, first, min(first + BLOCK, file.size)))
