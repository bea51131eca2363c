"""One small conversion with its golden, made once; and programs that pretend to be macOS's."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.verification.tiny import tiny_checkpoint, tiny_conversion


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(
        "qwen3_moe", tmp_path_factory.mktemp("bench") / "checkpoint", max_position_embeddings=128
    )


@pytest.fixture(scope="session")
def small(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One masked layer, decode and prefill, with a golden. Read only."""
    return tiny_conversion(
        small_checkpoint, tmp_path_factory.mktemp("bench") / "out", prefill=16, golden=True
    )


@pytest.fixture
def small_copy(small: Path, tmp_path: Path) -> Path:
    """The conversion, to damage."""
    return Path(shutil.copytree(small, tmp_path / "copy"))


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Put a program of a name on the PATH, with a shell script for its body."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def put(name: str, body: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)

    return put
