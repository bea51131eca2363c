"""Files are there whole or not at all, and what a killed run leaves is swept."""

import hashlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ane_moe.conversion.output_folder import sweep_unfinished
from ane_moe.errors import UserError
from ane_moe.files import replaced, scratch_folder, sha256, write_named_by_user, write_text

KILLED = """
import os, signal
from pathlib import Path
from ane_moe.files import replaced, scratch_folder
out = Path({out!r})
with scratch_folder(out, "copy") as folder, replaced(out / "a.bin") as temporary:
    (folder / "model").write_bytes(b"many bytes")
    temporary.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_a_file_and_a_folder_take_the_place_of_what_was_there(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    with replaced(tmp_path / "a") as temporary:
        temporary.write_text("new")
        assert (tmp_path / "a").read_text() == "old"
    assert (tmp_path / "a").read_text() == "new"
    (tmp_path / "b" / "inner").mkdir(parents=True)
    with replaced(tmp_path / "b") as temporary:
        temporary.mkdir()
        (temporary / "other").write_text("x")
    assert names(tmp_path) == ["a", "b", "other"]


def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    with pytest.raises(ZeroDivisionError), replaced(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_what_a_killed_process_leaves_is_swept_and_nothing_else(tmp_path: Path) -> None:
    write_text(tmp_path / "kept", "x")
    script = KILLED.format(out=str(tmp_path))
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[1], check=False
    )
    assert ended.returncode == -signal.SIGKILL and len(names(tmp_path)) == 4
    sweep_unfinished(tmp_path)
    assert names(tmp_path) == ["kept"]


def test_a_scratch_folder_is_gone_after_its_block(tmp_path: Path) -> None:
    with scratch_folder(tmp_path, "copy") as folder:
        (folder / "model").write_text("x")
    assert names(tmp_path) == []


def test_a_name_that_cannot_be_written_is_the_users_to_change(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written.*name another file"):
        write_named_by_user(tmp_path / "file" / "page.html", "x")


def test_the_digest_is_sha256s(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 1000)
    assert sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 1000).hexdigest()
