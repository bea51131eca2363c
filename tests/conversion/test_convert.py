"""The pipeline: the same bytes always, resumed after any interruption, and one clear line for bad
input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from ane_moe.conversion.pipeline import MARKER, ConvertOptions, convert
from ane_moe.emit.coreml.package import sha256
from ane_moe.errors import UserError
from ane_moe.manifest import FILE_NAME, read_manifest
from tests.models import edit_config, make_model, save_checkpoint

OPTIONS = ConvertOptions(prefill=0)


CONVERT = """
import sys
from pathlib import Path
from ane_moe.conversion.pipeline import convert, ConvertOptions
convert(Path(sys.argv[1]), Path(sys.argv[2]), ConvertOptions(prefill=0), progress=lambda step: print(1, flush=True))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(make_model("mixtral"), tmp_path_factory.mktemp("model") / "checkpoint")


@pytest.fixture(scope="module")
def finished(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("conversion") / "out"
    convert(checkpoint, out, OPTIONS)
    return out


@pytest.fixture
def own(checkpoint, tmp_path):
    """A checkpoint to spoil."""
    return shutil.copytree(checkpoint, tmp_path / "own")


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_manifest_describes_what_lies_in_the_folder(finished):
    manifest = read_manifest(finished)
    assert [shard.path for shard in manifest.shards_of("attn", 1)] == ["attn/layer_01.mlpackage"]
    assert manifest.files.keys() == contents(finished).keys() - {FILE_NAME}
    assert all(sha256(finished / name) == digest for name, digest in manifest.files.items())
    assert not (finished / MARKER).exists()
    assert str(finished.parent) not in (finished / FILE_NAME).read_text()


def test_embedding_rows_are_the_checkpoints_in_fp16(checkpoint, finished):
    table = load_file(checkpoint / "model.safetensors")["model.embed_tokens.weight"]
    assert (finished / "embed.bin").read_bytes() == table.half().numpy().tobytes()


def test_two_workers_write_the_same_bytes_as_one(checkpoint, finished, tmp_path):
    convert(checkpoint, tmp_path / "out", OPTIONS, workers=2)
    assert contents(tmp_path / "out") == contents(finished)


def test_a_second_run_reuses_every_shard(checkpoint, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    report = convert(checkpoint, out, OPTIONS)
    assert not report.written and len(report.reused) == len(report.manifest.shards)
    assert contents(out) == contents(finished)


def test_a_shard_of_other_weights_is_written_again(own, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    tensors = load_file(own / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"] *= 2
    save_file(tensors, own / "model.safetensors", {"format": "pt"})
    assert convert(own, out, OPTIONS).written == ("attn/layer_01.mlpackage",)


@pytest.mark.parametrize("after", [1, 4])
def test_a_killed_conversion_resumes_to_the_same_bytes(checkpoint, finished, tmp_path, after):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", CONVERT, checkpoint, out], stdout=subprocess.PIPE
    )
    for _ in range(after):
        process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / FILE_NAME).exists()
    (out / "attn").mkdir(exist_ok=True)
    (out / "attn" / ".writing-layer_01.mlpackage").mkdir(exist_ok=True)  # half a package
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/[!.]*.mlpackage")}
    time.sleep(0.01)
    report = convert(checkpoint, out, OPTIONS)
    assert {out / path for path in report.reused} == before.keys() and before
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    assert contents(out) == contents(finished)


def test_other_options_need_another_folder_or_overwrite(checkpoint, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    other = ConvertOptions(prefill=0, layers=(0,))
    with pytest.raises(UserError, match="another conversion"):
        convert(checkpoint, out, other)
    assert contents(out) == contents(finished)
    report = convert(checkpoint, out, other, overwrite=True)
    assert {path.parent.name for path in out.rglob("*.mlpackage")} == {"attn", "moe"}
    assert len(report.manifest.shards) == 2


def test_a_folder_that_holds_something_else_is_left_alone(checkpoint, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        convert(checkpoint, tmp_path, OPTIONS, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match="not a folder"):
        convert(checkpoint, tmp_path / "thesis.txt", OPTIONS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_weights_fp16_cannot_hold_name_their_tensor_and_layer(own, tmp_path, value):
    tensors = load_file(own / "model.safetensors")
    key = next(name for name in tensors if "layers.1" in name and "experts.3" in name)
    tensors[key][0, 0] = value
    save_file(tensors, own / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1.*experts\.3") as raised:
        convert(own, tmp_path / "out", OPTIONS)
    assert "\n" not in str(raised.value)
    assert (
        not list((tmp_path / "out").rglob(".writing-*"))
        and not (tmp_path / "out" / FILE_NAME).exists()
    )


def drop_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def add_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {**tensors, "model.extra.weight": torch.zeros(3)},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def turn_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    key = "model.layers.0.self_attn.k_proj.weight"
    save_file(
        {**tensors, key: tensors[key].T.contiguous()},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def quantise(folder):
    tensors = load_file(folder / "model.safetensors")
    key = "model.layers.0.self_attn.k_proj.weight"
    save_file(
        {**tensors, key: tensors[key].to(torch.float8_e4m3fn)},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def truncate(folder):
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)


SPOILED = {
    "lacks 1 tensor ": drop_tensor,
    "holds 1 tensor ": add_tensor,
    "wrong shape": turn_tensor,
    "stored as F8_E4M3": quantise,
    "truncated|beyond the end|shorter": truncate,
    "not supported; supported: afm, afmoe, ": lambda folder: edit_config(folder, model_type="gpt2"),
    "num_experts_per_tok": lambda folder: edit_config(folder, remove=("num_experts_per_tok",)),
    "no config.json": lambda folder: (folder / "config.json").unlink(),
}


@pytest.mark.parametrize("message", SPOILED)
def test_a_bad_checkpoint_is_refused_before_anything_is_written(own, tmp_path, message):
    SPOILED[message](own)
    with pytest.raises(UserError, match=message) as raised:
        convert(own, tmp_path / "out", OPTIONS)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(
    checkpoint, tmp_path, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="too full"):
        convert(checkpoint, tmp_path / "out", OPTIONS)
    assert not list((tmp_path / "out").rglob("*.mlpackage"))


def test_a_damaged_marker_does_not_claim_the_folder(checkpoint, tmp_path):
    (tmp_path / MARKER).write_text("{")
    with pytest.raises(UserError, match="another conversion"):
        convert(checkpoint, tmp_path, OPTIONS)
    (tmp_path / MARKER).write_text(json.dumps({"config": "x", "options": "y"}))
    with pytest.raises(UserError, match="another conversion"):
        convert(checkpoint, tmp_path, OPTIONS)


def test_bad_prompts_are_found_before_anything_is_written(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    save_checkpoint(make_model("mixtral"), checkpoint)
    (tmp_path / "prompts.json").write_text("[[1, 99999]]")
    with pytest.raises(UserError, match="vocabulary"):
        convert(checkpoint, tmp_path / "out", golden=True, prompts=tmp_path / "prompts.json")
    assert not (tmp_path / "out").exists()
