"""What only looks answers at once: it imports nothing that takes seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.verification.tiny import tiny_checkpoint, tiny_conversion

RUN = """
import sys
from ane_moe.cli import main
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended
print(*(name for name in ("torch", "coremltools", "transformers", "scipy") if name in sys.modules), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("mixtral", tmp_path_factory.mktemp("light") / "checkpoint")


@pytest.fixture(scope="module")
def package(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tiny_conversion(checkpoint, tmp_path_factory.mktemp("light") / "out")
    return out / "attn" / "layer_00.mlpackage"


def heavy_modules(*arguments: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stdout
    return done.stderr.splitlines()[-1].split()


def test_a_dry_run(checkpoint: Path, tmp_path: Path) -> None:
    assert heavy_modules("convert", str(checkpoint), str(tmp_path / "out"), "--dry-run") == []
    assert not (tmp_path / "out").exists()


def test_a_plan(checkpoint: Path) -> None:
    assert heavy_modules("plan", str(checkpoint / "config.json")) == []


@pytest.mark.parametrize("option", ["--json", "--ops", "--placement"])
def test_inspecting_a_package(package: Path, option: str) -> None:
    assert heavy_modules("inspect", str(package), option) == []


def test_the_cache() -> None:
    assert heavy_modules("cache", "--json") == []
