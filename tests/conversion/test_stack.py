"""Several layers in one shard: the same logits by fewer calls, proved like any other shard."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from ane_moe.checkpoints.checkpoint import open_checkpoint
from ane_moe.conversion.pipeline import convert, plan
from ane_moe.conversion.plan import ConvertOptions
from ane_moe.conversion.planner import make_plan
from ane_moe.errors import UserError
from ane_moe.families import describe
from ane_moe.formats.recipe import FP16
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from ane_moe.manifest import read_manifest
from ane_moe.verification.verify import verify
from tests.models import make_model, save_checkpoint

IDS = np.random.default_rng(1).integers(3, 211, 21).tolist()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stack") / "checkpoint"
    save_checkpoint(make_model("qwen3_moe"), folder)
    return folder


@pytest.fixture(scope="module")
def apart(checkpoint, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("apart") / "out"
    convert(checkpoint, out, ConvertOptions(context=64, recipe=FP16, prefill=16))
    return out


def logits_and_calls(out: Path) -> tuple[np.ndarray, int]:
    session = Session(load_shards(out, "reference"))
    session.prefill(IDS[:-1])
    before = session.figures.decode.calls
    return session.decode(IDS[-1]).copy(), session.figures.decode.calls - before


@pytest.mark.parametrize(("state", "layout"), [("mlstate", "bc1s"), ("explicit", "bct1")])
def test_stacked_layers_give_the_same_logits_by_fewer_calls(
    checkpoint, apart, tmp_path, state, layout
):
    options = ConvertOptions(
        context=64, recipe=FP16, prefill=16, layers_per_shard=2, state=state, layout=layout
    )
    convert(checkpoint, tmp_path / "out", options)
    kinds = [(shard.kind, shard.layers) for shard in read_manifest(tmp_path / "out").shards]
    assert kinds[:3] == [("stack", (0, 1)), ("attn", ()), ("moe", ())]
    stacked, fewer = logits_and_calls(tmp_path / "out")
    expected, calls = logits_and_calls(apart)
    np.testing.assert_allclose(stacked, expected, atol=2e-2)
    assert np.corrcoef(stacked, expected)[0, 1] > 0.99999
    assert calls - fewer == 3  # four calls of two layers have become one


def test_verify_proves_a_stack_and_finds_a_wrong_one(checkpoint, tmp_path):
    out = tmp_path / "out"
    convert(
        checkpoint, out, ConvertOptions(context=64, recipe=FP16, layers_per_shard=3), golden=True
    )
    report = verify(out, runtime="reference", decode_tokens=4)
    stacks = [row for row in report.shards if row.kind == "stack"]
    assert report.passed
    assert {row.function for row in stacks} == {"decode", "prefill"}
    assert {row.layer for row in report.routing} == {0, 2}
    other = tmp_path / "other"
    model = make_model("qwen3_moe")
    model.model.layers[1].mlp.down_proj.weight.data.mul_(1.2)
    save_checkpoint(model, other)
    wrong = verify(out, checkpoint=other, runtime="reference", decode_tokens=4)
    assert not wrong.passed
    assert not any(row.passed for row in wrong.shards if row.kind == "stack")


def test_the_size_limit_cuts_a_stack(checkpoint):
    spec, sources = describe(open_checkpoint(checkpoint))
    whole = make_plan(spec, sources, ConvertOptions(context=64, recipe=FP16, layers_per_shard=3))
    assert [shard.kind for shard in whole.shards[:1]] == ["stack"]
    tight = make_plan(
        spec, sources, ConvertOptions(context=64, recipe=FP16, layers_per_shard=3, max_shard_mb=0)
    )
    assert not any(shard.kind == "stack" for shard in tight.shards)


def test_experts_of_the_host_are_not_stacked(checkpoint):
    kinds = {
        shard.kind
        for shard in plan(checkpoint, ConvertOptions(routing="sparse", layers_per_shard=3)).shards
    }
    assert kinds == {"attn", "dense", "experts", "lm_head"}


def test_a_shard_needs_a_layer(checkpoint):
    with pytest.raises(UserError, match="needs a layer"):
        plan(checkpoint, ConvertOptions(layers_per_shard=0))


def test_stacks_hold_each_weight_once(checkpoint):
    for count, state in product((1, 2, 3), ("mlstate", "explicit")):
        shards = plan(
            checkpoint, ConvertOptions(context=64, recipe=FP16, layers_per_shard=count, state=state)
        ).shards
        names = [
            source.name
            for shard in shards
            if shard.kind != "lm_head"
            for source in shard.sources.values()
        ]
        assert len(names) == len(set(names))
