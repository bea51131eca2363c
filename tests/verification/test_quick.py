"""A quick look is at a part that it names, and its gates hold there."""

import json
import shutil

import pytest

from ane_moe.cli import main
from ane_moe.formats.recipe import INT8
from ane_moe.manifest import read_manifest
from ane_moe.verification.sample import sampled_prompts
from ane_moe.verification.verify import verify
from tests.verification.test_integrity import flip_byte, rehash
from tests.verification.tiny import tiny_checkpoint, tiny_conversion

BLOB = "Data/com.apple.CoreML/weights/weight.bin"
LAYERS = (0, 2, 5)  # the first, the dense one, the last


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quick")
    sizes = {"num_hidden_layers": 6, "mlp_only_layers": [2], "intermediate_size": 40}
    checkpoint = tiny_checkpoint("qwen3_moe", folder / "checkpoint", **sizes)
    out = tiny_conversion(checkpoint, folder / "out", recipe=INT8, prefill=16, golden=True)
    return checkpoint, out


@pytest.mark.parametrize("from_checkpoint", [True, False])
def test_a_quick_look_says_what_it_saw(from_checkpoint, made):
    checkpoint, out = made
    report = verify(out, checkpoint=checkpoint if from_checkpoint else None, quick=True)
    assert report.passed and not report.models and "quick look" in report.model_skipped
    sample = report.sample
    assert sample.layers == LAYERS and sample.of_layers == 6
    assert (sample.prompts, sample.of_prompts, report.golden_tokens) == (2, 4, 52)
    assert sample.layers_skipped is from_checkpoint
    seen = {row.path for row in report.shards} - {"embed.bin"}
    assert seen == {*sample.packages} and len(seen) < len(read_manifest(out).shards)
    assert report.as_stored.shards and {row.layer for row in report.routing} == {0, 5}


def test_of_an_inside_golden_rows_are_those_of_the_whole_proof(made):
    whole, quick = verify(made[1]), verify(made[1], quick=True)
    limits = {(row.path, row.function): row.cosine for row in whole.shards}
    for row in quick.shards:
        assert row.cosine == pytest.approx(limits[row.path, row.function], abs=1e-4)


def test_what_it_looks_at_can_fail_and_the_rest_is_only_missed_if_it_is_gone(made, tmp_path):
    out = shutil.copytree(made[1], tmp_path / "out")
    flip_byte(out / "attn/layer_01.mlpackage" / BLOB)
    assert verify(out, quick=True).passed and not verify(out).passed
    flip_byte(out / "attn/layer_05.mlpackage" / BLOB)
    assert [p.path for p in verify(out, quick=True).integrity] == [
        f"attn/layer_05.mlpackage/{BLOB}"
    ]
    (out / "attn/layer_03.mlpackage" / BLOB).unlink()
    assert f"attn/layer_03.mlpackage/{BLOB}" in {p.path for p in verify(out, quick=True).integrity}


def test_a_wrong_weight_of_a_layer_it_sees_fails_its_gate(made, tmp_path):
    out = shutil.copytree(made[1], tmp_path / "out")
    shutil.copyfile(out / f"moe/layer_00.mlpackage/{BLOB}", out / f"moe/layer_05.mlpackage/{BLOB}")
    rehash(out, f"moe/layer_05.mlpackage/{BLOB}")
    report = verify(out, quick=True)
    assert not report.passed and {row.layer for row in report.shards if not row.passed} == {5}


def test_of_dispatched_experts_the_first_middle_and_last_are_called(made, tmp_path):
    out = tiny_conversion(
        made[0], tmp_path / "out", routing="sparse", expert_tokens=(1, 4), layers=(0,), golden=True
    )
    report = verify(out, quick=True)
    called = {row.function for row in report.shards if row.kind == "experts"}
    assert report.passed
    assert called == {f"expert_{n:03d}_t{t}" for n in (0, 2, 3) for t in (1, 4)}


def test_the_command_prints_and_gives_what_was_looked_at(made, capsys):
    for option in ([], ["--json"]):
        with pytest.raises(SystemExit) as ended:
            main(["verify", str(made[1]), "--quick", *option])
        assert not ended.value.code
        printed = capsys.readouterr().out
        if option:
            assert json.loads(printed)["sample"]["layers"] == [*LAYERS]
        else:
            assert "quick look: layers 0, 2, 5 of 6" in " ".join(printed.split())


def test_the_shortest_prompts_that_have_something_to_predict_are_taken():
    assert sampled_prompts([[1] * 9, [1], [1] * 4, [1] * 5]) == [2, 3]
    assert sampled_prompts([[1], [2]]) == [0, 1]
