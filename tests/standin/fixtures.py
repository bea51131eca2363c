"""`standin`: Core ML as a test wants it, in this process and in those it starts, until the test
ends."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from ane_moe.coreml_tools import ct
from tests.standin.install import environment, install
from tests.standin.script import Script


@dataclass
class StandIn:
    folder: Path
    current: Script

    def script(self, **changes: object) -> None:
        """Change what happens from now on; see Script."""
        self.current = replace(self.current, **changes)
        self.current.write(self.folder / "script.json")

    def log(self) -> list[str]:
        """The native steps so far, in every process: "compile net.mlpackage", "load decode",
        "predict decode"."""
        log = Path(self.current.log)
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def standin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    folder = tmp_path / "standin"
    script = Script(log=str(folder / "log"))
    for name, value in environment(folder, script).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)  # the children's first import path
    install(monkeypatch.setattr, monkeypatch.setitem)
    yield StandIn(folder, script)
    assert os.environ["PATH"].startswith(str(folder)), (
        "the environment was changed under the stand-in"
    )
    ct.models.utils._macos_version.cache_clear()
