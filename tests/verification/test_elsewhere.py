"""Stages that others prove give the report that this process would."""

import threading
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from ane_moe.commands.verify import verify as verify_command
from ane_moe.demo import demo_checkpoint
from ane_moe.errors import UserError
from ane_moe.files import TEMPORARY
from ane_moe.formats.recipe import find_recipe
from ane_moe.hub.fetched import fetched
from ane_moe.manifest import read_manifest
from ane_moe.verification.elsewhere import by_workers, shared_goldens
from ane_moe.verification.result import VerifyReport
from ane_moe.verification.stage import stages
from ane_moe.verification.verify import verify
from tests.conversion import bucket
from tests.conversion.test_convert import contents
from tests.early import drawn_file
from tests.verification.tiny import SIZES, tiny_checkpoint, tiny_conversion

verify_module = import_module("ane_moe.verification.verify")


class Counted(ThreadPoolExecutor):
    """A pool that knows what it was asked."""

    calls: tuple[str, ...] = ()

    def submit(self, function, /, *arguments, **named):
        self.calls += tuple(one.name for one in arguments)
        return super().submit(function, *arguments, **named)


@contextmanager
def shared(pool, _, proof, trials, goldens, captured):
    """What a cluster does, with processes or threads of this machine."""
    with (
        shared_goldens(proof.out, proof.manifest, goldens, captured) as (where, files),
        by_workers(proof, trials, pool, where, files) as begun,
    ):
        yield begun


def test_functions_proved_by_a_pool_are_those_proved_here(
    conversion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = verify(conversion, runtime="reference")
    with Counted(2) as pool:
        monkeypatch.setattr(verify_module, "_on_cluster", partial(shared, pool))
        there = verify(conversion, runtime="reference", cluster="tcp://there:1")
    assert here.passed and there == replace(here, folder=there.folder)
    assert pool.calls == tuple(
        f"stage {number}" for number, _ in enumerate(stages(read_manifest(conversion)))
    )


def proved_by_a_pool(monkeypatch: pytest.MonkeyPatch, out: Path, **options: Any) -> VerifyReport:
    with Counted(2) as pool, monkeypatch.context() as patched:
        patched.setattr(verify_module, "_on_cluster", partial(shared, pool))
        return verify(out, runtime="reference", cluster="tcp://there:1", **options)


@pytest.mark.parametrize("quick", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_golden_captured_now_is_what_they_are_held_to(
    conversion: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, quick: bool
) -> None:
    here = verify(conversion, runtime="reference", checkpoint=checkpoint, quick=quick)
    there = proved_by_a_pool(monkeypatch, conversion, checkpoint=checkpoint, quick=quick)
    assert here.passed and there == replace(here, folder=there.folder)
    assert not [*conversion.glob(f"{TEMPORARY}golden*")]


@pytest.mark.parametrize(
    "options",
    [
        {"recipe": find_recipe("int8"), "stream_divisor": 4},
        {"routing": "stream"},
        pytest.param({"routing": "sparse"}, marks=pytest.mark.slow),
    ],
)
def test_a_conversion_at_an_address_is_proved_by_what_workers_fetch(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict
) -> None:
    monkeypatch.setenv(bucket.VARIABLE, "")
    bucket.begin(tmp_path)
    out = tiny_conversion(checkpoint, tmp_path / "some" / "out", golden=True, **options)
    folder, before = fetched("bucket://some/out"), contents(out)
    here = verify(folder, runtime="reference")
    there = proved_by_a_pool(monkeypatch, folder)
    assert here.passed and there == replace(here, folder=there.folder)
    again = proved_by_a_pool(monkeypatch, folder, checkpoint=checkpoint, quick=True)
    assert again.passed and contents(out) == before


def test_shards_that_guess_experts_are_proved_by_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tiny_checkpoint("qwen3_moe", tmp_path / "checkpoint", num_hidden_layers=2)
    adapters, out = drawn_file(tmp_path / "a.npz", SIZES["hidden_size"], [0], 1), tmp_path / "out"
    shape = {"routing": "sparse", "early": str(adapters), "ahead": 1}
    tiny_conversion(checkpoint, out, golden=True, **shape)
    monkeypatch.setenv(bucket.VARIABLE, "")
    bucket.begin(tmp_path)
    folder = fetched("bucket://out")
    here, there = verify(folder, runtime="reference"), proved_by_a_pool(monkeypatch, folder)
    assert here.passed and there == replace(here, folder=there.folder)
    assert any(row.function.endswith("guess") for row in there.shards)


def test_nothing_is_begun_after_an_interruption(
    conversion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(Executor):
        """Has room for one call, and keeps the next one waiting until it is shut down."""

        def __init__(self):
            self.calls, self.closed = [], threading.Event()

        def submit(self, function, /, *arguments, **_):
            if self.calls and self.closed.wait(30):
                raise RuntimeError("closed")
            self.calls.append(arguments)
            return Future()

        def shutdown(self, wait=True, *, cancel_futures=False):
            self.closed.set()

    def interrupted(what: str, *_: int) -> None:
        if pool.calls:
            raise KeyboardInterrupt

    pool = Full()
    monkeypatch.setattr(verify_module, "_on_cluster", partial(shared, pool))
    with pytest.raises(KeyboardInterrupt):
        verify(conversion, runtime="reference", cluster="tcp://there:1", progress=interrupted)
    assert len(pool.calls) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
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
