"""One small real conversion with its golden, made once and copied by the tests that damage it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.verification.tiny import tiny_checkpoint, tiny_conversion


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse and a dense layer."""
    return tiny_checkpoint(
        "qwen3_moe",
        tmp_path_factory.mktemp("checkpoint"),
        num_hidden_layers=2,
        mlp_only_layers=[1],
        intermediate_size=40,
        max_position_embeddings=128,
    )


@pytest.fixture(scope="session")
def conversion(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Decode and prefill, with a golden. Read only."""
    return tiny_conversion(
        checkpoint, tmp_path_factory.mktemp("conversion") / "out", prefill=16, golden=True
    )


@pytest.fixture
def copy(conversion: Path, tmp_path: Path) -> Callable[[], Path]:
    """A conversion to damage."""
    return lambda: Path(shutil.copytree(conversion, tmp_path / "copy"))
