"""A hashed file holds what was written, has its sha256, and passes errors of the disk on."""

import errno
import fcntl
import hashlib
from io import FileIO

import numpy as np
import pytest

from ane_moe import hashed_file
from ane_moe.hashed_file import PIECE, HashedFile

NUMBERS = np.random.default_rng(0).integers(0, 256, 3 * PIECE + 17, np.uint8).tobytes()


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 3 * PIECE + 17])
def test_it_holds_what_was_written_and_knows_its_digest(tmp_path, size):
    path, data, part = tmp_path / "file", NUMBERS[:size], bytearray(300_000)
    with HashedFile(path) as file:
        for first in range(0, size, len(part)):
            piece = data[first : first + len(part)]
            part[: len(piece)] = piece  # the same memory again: what was written may change
            file.write(memoryview(part)[: len(piece)])
    assert path.read_bytes() == data
    assert file.sha256 == hashlib.sha256(data).hexdigest()


def test_arrays_of_any_type_are_their_bytes(tmp_path):
    values = np.arange(12, dtype="<f2").reshape(3, 4)
    with HashedFile(tmp_path / "file") as file:
        file.write(values)
    assert (tmp_path / "file").read_bytes() == values.tobytes()


class Refusing(FileIO):
    """Writes nothing past the page cache, and never all at once."""

    def write(self, data):
        if fcntl.fcntl(self, fcntl.F_GETFL) & hashed_file.PAST_THE_CACHE:
            raise OSError(errno.EINVAL, "Invalid argument")
        return super().write(data[:1_000_000])


def test_a_file_system_that_must_use_the_page_cache_gets_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(hashed_file, "FileIO", Refusing)
    with HashedFile(tmp_path / "file") as file:
        file.write(NUMBERS)
    assert (tmp_path / "file").read_bytes() == NUMBERS
    assert file.sha256 == hashlib.sha256(NUMBERS).hexdigest()


class Full(FileIO):
    """A disk with room for one piece."""

    def write(self, data):
        if self.tell() >= PIECE:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


@pytest.mark.parametrize("size", [PIECE + 1, 2 * PIECE, 3 * PIECE + 17])
def test_a_full_disk_is_an_error_of_the_caller(tmp_path, monkeypatch, size):
    monkeypatch.setattr(hashed_file, "FileIO", Full)
    with pytest.raises(OSError, match="No space left"), HashedFile(tmp_path / "file") as file:
        file.write(NUMBERS[:size])


def test_an_error_of_the_caller_ends_the_writing(tmp_path):
    with pytest.raises(KeyboardInterrupt), HashedFile(tmp_path / "file") as file:
        file.write(NUMBERS[: 2 * PIECE])
        raise KeyboardInterrupt
    assert file.sha256 == ""
