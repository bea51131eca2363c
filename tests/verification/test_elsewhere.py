"""Stages that others prove give the report that this process would."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ane_moe.commands.verify import verify as verify_command
from ane_moe.demo import demo_checkpoint
from ane_moe.errors import UserError
from ane_moe.manifest import read_manifest
from ane_moe.verification.elsewhere import by_workers
from ane_moe.verification.stage import stages
from ane_moe.verification.verify import verify
from tests.verification.tiny import tiny_conversion

verify_module = import_module("ane_moe.verification.verify")


class Counted(ThreadPoolExecutor):
    """A pool that knows what it was asked."""

    calls: tuple[str, ...] = ()

    def submit(self, function, /, *arguments, **named):
        self.calls += tuple(one.name for one in arguments)
        return super().submit(function, *arguments, **named)


def test_functions_proved_by_a_pool_are_those_proved_here(
    conversion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = verify(conversion, runtime="reference")
    with Counted(2) as pool:
        monkeypatch.setattr(
            verify_module, "_on_cluster", lambda _, proof, trials: by_workers(proof, trials, pool)
        )
        there = verify(conversion, runtime="reference", cluster="tcp://there:1")
    assert here.passed and there == replace(here, folder=there.folder)
    assert pool.calls == tuple(
        f"stage {number}" for number, _ in enumerate(stages(read_manifest(conversion)))
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"checkpoint": Path("x")}, "--cluster proves by the golden in OUT; found: --checkpoint"),
        ({"precision": "engine"}, "--cluster proves by exact sums; found: --precision engine"),
    ],
)
def test_what_a_cluster_cannot_share_is_said(conversion: Path, options: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        verify(conversion, cluster="tcp://there:1", **options)


def test_there_is_nothing_for_a_cluster_without_a_golden(tmp_path: Path) -> None:
    out = tiny_conversion(demo_checkpoint(), tmp_path / "out", context=32, prefill=0)
    app = typer.Typer()
    app.command()(verify_command)
    asked = [str(out), "--compute-plan", "--cluster", "tcp://there:1"]
    refused = CliRunner().invoke(app, asked).exception
    assert isinstance(refused, UserError) and "no golden in" in str(refused)
