import os
from pathlib import Path

import pytest

from ane_moe.lfs import is_lfs_pointer

# The example of the specification (git-lfs/docs/spec.md).
POINTER = """version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 12345
"""


def test_the_pointer_of_the_specification_is_one(tmp_path: Path) -> None:
    (tmp_path / "weight.bin").write_text(POINTER)
    assert is_lfs_pointer(tmp_path / "weight.bin")


@pytest.mark.parametrize(
    "data",
    [b"", b"version", b"\x01\0\0\0\x02\0\0\0" * 8, POINTER.encode() + bytes(1024)],
    ids=["empty", "cut short", "a weight file", "text of another size"],
)
def test_other_files_are_not_pointers(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "weight.bin").write_bytes(data)
    assert not is_lfs_pointer(tmp_path / "weight.bin")


def test_what_is_no_plain_file_is_not_a_pointer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    names = ("absent", "pipe", "loop", ".", "\0")
    assert not any(is_lfs_pointer(tmp_path / name) for name in names)
