"""A proof that was broken off goes on where it was, and only where everything is as it was."""

import json
import os
import signal
import subprocess
import sys

import pytest

from ane_moe.cli import main
from ane_moe.conversion.output_folder import sweep_unfinished
from ane_moe.formats.recipe import INT8
from ane_moe.manifest import read_manifest
from ane_moe.verification import proof
from ane_moe.verification.verify import verify
from tests.verification.test_integrity import BLOB, problems, rehash
from tests.verification.tiny import edit_tensors, tiny_checkpoint, tiny_conversion

STAGES = 5  # attention and experts, attention and feed-forward block, head
BROKEN_OFF = 3  # at the start of this stage, counted from 0


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint of two layers, and its int8 conversion, which has two goldens."""
    folder = tmp_path_factory.mktemp("kept")
    sizes = {"num_hidden_layers": 2, "mlp_only_layers": [1], "intermediate_size": 40}
    checkpoint = tiny_checkpoint("qwen3_moe", folder / "checkpoint", **sizes)
    return checkpoint, tiny_conversion(checkpoint, folder / "out", recipe=INT8, prefill=16)


@pytest.fixture
def own(made, tmp_path):
    """A checkpoint and a conversion to spoil."""
    copies = [tmp_path / part.name for part in made]
    for part, copied in zip(made, copies, strict=True):
        subprocess.run(["cp", "-r", part, copied], check=True)
    return copies


def break_off(monkeypatch, checkpoint, out, **options):
    """Run `verify` until Ctrl-C at a stage; the names of what is kept."""
    started, stage = [], proof.Proof._stage

    def interrupted(self, *arguments):
        started.append(arguments)
        if len(started) > BROKEN_OFF:
            raise KeyboardInterrupt
        return stage(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(proof.Proof, "_stage", interrupted)
        with pytest.raises(KeyboardInterrupt):
            verify(out, checkpoint=checkpoint, **options)
    (folder,) = out.glob(".writing-proof-*")
    return folder


def document(report):
    return {name: value for name, value in report.as_json().items() if name != "reused_steps"}


def test_a_run_goes_on_and_says_the_same_as_one_that_was_not_broken_off(own, monkeypatch):
    checkpoint, out = own
    expected = verify(out, checkpoint=checkpoint)
    folder = break_off(monkeypatch, checkpoint, out)
    assert {path.name for path in folder.iterdir()} >= {"layer_001", "stage_0002"}
    assert problems(out) == {}  # what is kept is no damage
    opened, open_package = [], proof.open_package
    monkeypatch.setattr(
        proof, "open_package", lambda path, *rest: opened.append(path) or open_package(path, *rest)
    )
    report = verify(out, checkpoint=checkpoint)
    assert report.reused_steps == 2 + BROKEN_OFF and document(report) == document(expected)
    late = [shard.path for shard in read_manifest(out).shards][BROKEN_OFF:]
    assert [path.relative_to(out).as_posix() for path in opened] == late
    assert not list(out.glob(".*"))


def test_a_killed_run_goes_on_too(own):
    checkpoint, out = own
    expected = verify(out, checkpoint=checkpoint)
    program = f"""
import os, signal
from pathlib import Path
from ane_moe.verification import proof
from ane_moe.verification.verify import verify
stage, calls = proof.Proof._stage, []
def killed(self, *arguments):
    calls.append(0)
    if len(calls) > {BROKEN_OFF}:
        os.kill(os.getpid(), signal.SIGKILL)
    return stage(self, *arguments)
proof.Proof._stage = killed
verify(Path({str(out)!r}), checkpoint=Path({str(checkpoint)!r}))
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    report = verify(out, checkpoint=checkpoint)
    assert report.reused_steps == 2 + BROKEN_OFF and document(report) == document(expected)


def test_capturing_goes_on_after_the_last_whole_layer(own, monkeypatch):
    checkpoint, out = own
    expected = verify(out, checkpoint=checkpoint)
    folder = break_off(monkeypatch, checkpoint, out)
    for path in [*folder.glob("stage_*"), folder / "layer_001"]:
        path.unlink()
    report = verify(out, checkpoint=checkpoint)
    assert report.reused_steps == 1 and document(report) == document(expected)


@pytest.mark.parametrize("step", ["layer_000", "layer_001", "stage_0001"])
def test_a_damaged_result_is_made_again(step, own, monkeypatch):
    checkpoint, out = own
    expected = verify(out, checkpoint=checkpoint)
    folder = break_off(monkeypatch, checkpoint, out)
    (folder / step).write_bytes((folder / step).read_bytes()[:-40])
    assert document(verify(out, checkpoint=checkpoint)) == document(expected)


def another_checkpoint(checkpoint, out):
    def double(tensors):
        tensors["model.layers.0.mlp.experts.0.up_proj.weight"] *= 2

    edit_tensors(checkpoint, double)
    return {}


def a_changed_package(checkpoint, out):
    path = out / BLOB
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    rehash(out, BLOB)
    return {}


def other_prompts(checkpoint, out):
    (out.parent / "prompts.json").write_text("[[5, 6, 7, 8]]")
    return {"prompts": out.parent / "prompts.json"}


@pytest.mark.parametrize(
    "change",
    [
        another_checkpoint,
        a_changed_package,
        other_prompts,
        lambda *_: {"decode_tokens": 4},
        pytest.param(lambda *_: {"precision": "fp16"}, marks=pytest.mark.slow),
        pytest.param(lambda *_: {"precision": "engine"}, marks=pytest.mark.slow),
        lambda *_: {"quick": True},
        lambda *_: {"fresh": True},
    ],
)
def test_nothing_is_reused_once_anything_is_otherwise(change, own, monkeypatch):
    checkpoint, out = own
    break_off(monkeypatch, checkpoint, out)
    options = change(checkpoint, out)
    report = verify(out, checkpoint=checkpoint, **options)
    assert report.reused_steps == 0
    again = verify(out, checkpoint=checkpoint, **options | {"fresh": True})
    assert document(report) == document(again)


def test_other_gates_judge_what_was_measured(own, monkeypatch):
    checkpoint, out = own
    expected = verify(out, checkpoint=checkpoint, min_cosine=0.99999)
    break_off(monkeypatch, checkpoint, out)
    report = verify(out, checkpoint=checkpoint, min_cosine=0.99999)
    assert report.reused_steps and not report.passed and document(report) == document(expected)


def test_the_next_conversion_sweeps_what_is_kept(own, monkeypatch):
    folder = break_off(monkeypatch, *own)
    sweep_unfinished(own[1])
    assert not folder.exists()


def test_ctrl_c_says_that_the_same_command_goes_on(own, monkeypatch, capsys):
    def interrupted(*_arguments):
        raise KeyboardInterrupt

    checkpoint, out = own
    monkeypatch.setattr(proof.Proof, "_stage", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(out), "--checkpoint", str(checkpoint)])
    assert ended.value.code == 130 and "the same command goes on" in capsys.readouterr().err
    monkeypatch.undo()
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(out), "--checkpoint", str(checkpoint), "--json"])
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out)["reused_steps"] == 2
