"""Which goldens of an earlier run a conversion keeps, against ones captured anew."""

import shutil
from contextlib import nullcontext
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from ane_moe.checkpoints.checkpoint import open_checkpoint
from ane_moe.conversion import workers as conversion_workers
from ane_moe.conversion.pipeline import ConvertOptions, convert
from ane_moe.formats.recipe import FP16
from ane_moe.original import stream as hf_stream
from ane_moe.original.capture import capture_golden
from ane_moe.original.golden import read_golden
from tests.models import make_model, save_checkpoint

SMALL = ConvertOptions(prefill=0, context=32)
PLAIN = replace(SMALL, recipe=FP16, layers=(1,))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    return save_checkpoint(make_model("mixtral", num_hidden_layers=3), folder)


@pytest.fixture(scope="module")
def finished(checkpoint, tmp_path_factory):
    """A conversion of the middle layer, with its golden."""
    out = tmp_path_factory.mktemp("conversion") / "out"
    convert(checkpoint, out, PLAIN, golden=True)
    return out


@pytest.fixture
def own(checkpoint, tmp_path):
    """A checkpoint to spoil."""
    return shutil.copytree(checkpoint, tmp_path / "own")


@pytest.fixture
def out(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "out")


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_a_second_run_keeps_the_goldens_it_has_and_says_so(checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = convert(checkpoint, out, SMALL, golden=True)
    assert not first.golden_kept and first.manifest.golden_as_stored
    before = contents(out)
    monkeypatch.setattr(hf_stream, "StreamedModel", None)  # what captures needs it
    second = convert(checkpoint, out, SMALL, golden=True)
    assert second.golden_kept and contents(out) == before
    third = convert(checkpoint, out, SMALL)
    assert third.golden_kept and contents(out) == before


def double(folder, name):
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name] * 2
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


EMBEDDING = "model.embed_tokens.weight"
LAYER_BEFORE = "model.layers.0.self_attn.q_proj.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
LAYER_AFTER = "model.layers.2.self_attn.q_proj.weight"


@pytest.mark.parametrize("changed", [EMBEDDING, LAYER_BEFORE, EXPERT, "lm_head.weight"])
def test_a_golden_of_other_weights_is_captured_again(changed, own, out, tmp_path):
    before = (out / "golden.safetensors").read_bytes()
    double(own, changed)
    report = convert(own, out, PLAIN, golden=True)
    assert not report.golden_kept and (out / "golden.safetensors").read_bytes() != before
    fresh = tmp_path / "fresh.safetensors"
    prompts = [list(ids) for ids in read_golden(out / "golden.safetensors").prompts]
    capture_golden(open_checkpoint(own), layers=(1,), prompts=prompts, out=fresh, context=32)
    assert (out / "golden.safetensors").read_bytes() == fresh.read_bytes()


def test_a_layer_after_those_converted_has_no_part_in_the_golden(own, out):
    before = (out / "golden.safetensors").read_bytes()
    double(own, LAYER_AFTER)
    assert convert(own, out, PLAIN, golden=True).golden_kept
    convert(own, out, PLAIN, golden=True, overwrite=True)
    assert (out / "golden.safetensors").read_bytes() == before


def test_without_golden_one_of_other_weights_does_not_stay(own, out):
    double(own, EMBEDDING)
    report = convert(own, out, PLAIN)
    assert report.manifest.golden is None and not (out / "golden.safetensors").exists()


def test_other_prompts_a_spoiled_file_and_overwrite_capture_again(checkpoint, out, tmp_path):
    def kept(**options):
        return convert(checkpoint, out, PLAIN, golden=True, **options).golden_kept

    golden = out / "golden.safetensors"
    good = golden.read_bytes()
    golden.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert not kept() and golden.read_bytes() == good
    assert not kept(overwrite=True) and golden.read_bytes() == good
    prompts = tmp_path / "prompts.json"
    prompts.write_text("[[5, 6, 8]]")
    assert not kept(prompts=prompts)
    assert read_golden(golden).prompts == ((5, 6, 8),)
    assert kept(prompts=prompts)


def test_a_second_run_begins_no_processes_where_there_is_nothing_to_write(
    checkpoint, out, monkeypatch
):
    asked = []

    def counted(workers, preload):
        asked.append(workers)
        return nullcontext()

    monkeypatch.setattr(conversion_workers, "open_pool", counted)
    assert convert(checkpoint, out, PLAIN, workers=2).golden_kept
    assert asked == []
    shutil.rmtree(out / "attn" / "layer_01.mlpackage")
    assert convert(checkpoint, out, PLAIN, workers=2).written == ("attn/layer_01.mlpackage",)
    assert asked == [2]
