"""Attention in a window with caches of no more than that: the same model, in fewer bytes."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ane_moe.checkpoints.checkpoint import open_checkpoint
from ane_moe.conversion.pipeline import convert
from ane_moe.conversion.plan import ConversionPlan, ConvertOptions, sources_of
from ane_moe.conversion.planner import make_plan
from ane_moe.families import describe
from ane_moe.formats.recipe import FP16
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from tests.models import make_model, make_variant, save_checkpoint

IDS = np.random.default_rng(2).integers(3, 211, 60).tolist()
CLOSE = 2e-2


def planned(model, folder: Path, **options) -> ConversionPlan:
    spec, _ = describe(open_checkpoint(save_checkpoint(model, folder)))
    return make_plan(spec, sources_of(spec), ConvertOptions(recipe=FP16, **options))


def cache_bytes(plan: ConversionPlan) -> int:
    return sum(2 * math.prod(shape) for shard in plan.shards for shape in shard.states.values())


@pytest.mark.parametrize("tokens", [0, 16])
def test_caches_hold_the_window_and_what_a_call_brings(tokens: int, tmp_path: Path) -> None:
    model = make_model("pt_moe", sliding_window=64)
    plan = planned(model, tmp_path, context=256, prefill=tokens)
    config, length = model.config, math.ceil((64 + max(tokens, 1) - 1) / 32) * 32
    rows = [min(256, length) if n % 4 < 3 else 256 for n in range(config.num_hidden_layers)]
    # Keys and values of all tracks' heads, two bytes each.
    assert cache_bytes(plan) == sum(rows) * 2 * 2 * config.num_key_value_heads * config.head_dim
    if not tokens:
        assert rows == [min(256, 64), 64, 64, 256, 64, 64]
    assert cache_bytes(planned(model, tmp_path, context=32, prefill=tokens)) == (
        6 * 32 * 4 * config.num_key_value_heads * config.head_dim
    )


def test_other_families_have_them_when_asked_for(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = make_variant("mixtral tied with windows")
    options = {"context": 96, "prefill": 16}
    plain = planned(model, tmp_path / "checkpoint", **options)
    slots = {port.slot for shard in plain.shards for port in shard.functions[0].ports}
    assert not any("ring" in slot for slot in slots)
    ringed = planned(model, tmp_path / "checkpoint", ring_caches=True, **options)
    assert cache_bytes(ringed) * 3 == cache_bytes(plain)  # 17 + 15 slots, not 96
    options = ConvertOptions(recipe=FP16, context=96, prefill=16, ring_caches=True)
    convert(tmp_path / "checkpoint", tmp_path / "out", replace(options, layers_per_shard=3))
    session = Session(load_shards(tmp_path / "out", "reference"))
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0].numpy()
    session.prefill(IDS[:41])
    for place, identifier in enumerate(IDS[41:], 41):
        found = session.decode(identifier)
        norms = np.linalg.norm(found) * np.linalg.norm(expected[place])
        assert float(found @ expected[place]) / norms > 0.9999
