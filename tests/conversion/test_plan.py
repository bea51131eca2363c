"""Plans: how a model is cut, checked by hand calculations on real geometries."""

import dataclasses
import itertools
import math

import pytest

from ane_moe.checkpoints.checkpoint import TensorSource
from ane_moe.conversion import planner as planning
from ane_moe.conversion.plan import MB, ConvertOptions, OneHot
from ane_moe.conversion.planner import MAX_HEAD_ROWS, make_plan
from ane_moe.errors import UserError
from ane_moe.formats.recipe import FP16
from ane_moe.model.spec import (
    GqaSpec,
    HeadSpec,
    LayerSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    NormSpec,
    RopeSpec,
    RouterSpec,
)
from ane_moe.number_lists import parse_counts, parse_layers

ATTENTION = GqaSpec(32, 4, 128, 128**-0.5, "main", qk_norm="head")
QWEN3 = ModelSpec(
    family="qwen3_moe",
    d_model=2048,
    vocab=151_936,
    context=40_960,
    norm=NormSpec(),
    layers=(LayerSpec(ATTENTION, MoeSpec(RouterSpec(128, 8), MlpSpec(768))),) * 2,
    head=HeadSpec(tied=False),
    ropes={"main": RopeSpec(tuple(1.0 for _ in range(64)))},
)


def plan(spec=QWEN3, **options):
    sources = {
        name: TensorSource(name, str(name), row.shape, weight=row) for name, row in spec.weights()
    }
    return make_plan(spec, sources, ConvertOptions(**{"recipe": FP16, **options}))


def with_experts(count, width):
    moe = MoeSpec(RouterSpec(count, 2), MlpSpec(width))
    return dataclasses.replace(
        QWEN3, layers=tuple(dataclasses.replace(layer, ffn=moe) for layer in QWEN3.layers)
    )


def test_qwen3_30b_splits_its_layers_into_eight_equal_self_contained_parts():
    shards = [shard for shard in plan().shards if shard.kind == "moe" and shard.layer == 0]
    # One expert is 3 x 2048 x 768 x 2 bytes = 9.44 MB: 23 fit into 220 MB, six parts are needed,
    # eight are equal.
    assert [shard.experts for shard in shards] == [
        tuple(range(first, first + 16)) for first in range(0, 128, 16)
    ]
    assert [shard.path for shard in shards][:2] == [
        "moe/layer_00_part_1.mlpackage",
        "moe/layer_00_part_2.mlpackage",
    ]
    assert all(shard.weight_bytes <= 220 * MB for shard in shards)
    assert len({shard.graphs[""] for shard in shards}) == 2  # the first carries the residual
    assert shards[3].sources["select.weight"] == OneHot(16, 128, 48)
    assert str(shards[3].sources["experts.2.up.weight"].name) == "layers.0.ffn.experts.50.up.weight"
    assert "1208 MB in one piece" in shards[0].reason


def test_layers_share_their_templates():
    one_layer, whole = (
        {shard.graphs[""] for shard in plan(layers=layers).shards} for layers in ((0,), None)
    )
    assert len(whole - one_layer) == 1  # only the head is new


def test_every_weight_has_a_source_of_its_size():
    for shard in plan().shards:
        assert shard.weight_bytes == sum(
            2 * math.prod(source.shape) for source in shard.sources.values()
        )


def test_bytes_add_up_to_the_model():
    conversion = plan()
    norms_and_routers = 7 * 2 * (2048 + 128 * 2048) * 2  # each further part has its own
    selections = 2 * 8 * 16 * 128 * 2
    head_norms = (len([s for s in conversion.shards if s.kind == "lm_head"]) - 1) * 2048 * 2
    model = sum(2 * math.prod(row.shape) for _, row in QWEN3.weights())
    assert conversion.disk_bytes == model + norms_and_routers + selections + head_norms


@pytest.mark.parametrize("vocab", [211, 32_000, 49_155, 151_936, 262_272])
def test_the_head_is_at_least_two_slices_none_too_wide(vocab):
    heads = [s for s in plan(dataclasses.replace(QWEN3, vocab=vocab)).shards if s.kind == "lm_head"]
    rows = [shard.rows for shard in heads]
    assert rows[0][0] == 0 and rows[-1][1] == vocab and len(rows) >= 2
    assert all(first[1] == second[0] for first, second in itertools.pairwise(rows))
    assert max(last - first for first, last in rows) <= MAX_HEAD_ROWS
    assert heads[1].sources["rows.weight"].rows == rows[1]


def test_an_expert_above_the_limit_gets_a_part_of_its_own_and_the_plan_says_so():
    shards = [
        shard
        for shard in plan(with_experts(8, 20_000)).shards
        if shard.kind == "moe" and shard.layer == 0
    ]
    assert [shard.experts for shard in shards] == [(e,) for e in range(8)]
    assert "one expert alone is above it" in shards[0].reason


def test_uneven_experts_are_cut_nearly_evenly():
    sizes = [
        len(s.experts)
        for s in plan(with_experts(61, 1408)).shards
        if s.kind == "moe" and s.layer == 0
    ]
    assert sum(sizes) == 61 and max(sizes) <= 12


def test_nothing_passes_two_gibibytes():
    wide = dataclasses.replace(QWEN3, layers=(LayerSpec(QWEN3.layers[0].mixer, MlpSpec(200_000)),))
    with pytest.raises(UserError, match="2 GiB"):
        plan(wide)


@pytest.mark.parametrize(
    ("asked", "context", "width"), [(None, 2048, 2048), (100, 100, 128), (40_960, 40_960, 40_960)]
)
def test_the_cache_is_a_multiple_of_32_wide(asked, context, width):
    conversion = plan(context=asked)
    assert (conversion.context, conversion.cache_width) == (context, width)


def test_a_context_longer_than_the_models_is_refused():
    with pytest.raises(UserError, match="the model's own is 40960"):
        plan(context=50_000)


def test_a_subset_of_layers_has_no_head():
    assert {shard.layer for shard in plan(layers=(1,)).shards} == {1}
    with pytest.raises(UserError, match="no layer 2"):
        plan(layers=(0, 2))


def test_lists_of_layers():
    assert parse_layers("0-3") == (0, 1, 2, 3)
    assert parse_layers("5,0,7-8") == (0, 5, 7, 8)
    for wrong in ("", "a", "3-", "-1", "1;2"):
        with pytest.raises(UserError):
            parse_layers(wrong)


def test_sparse_routing_makes_one_package_of_all_experts_and_no_moe_shard():
    shards = plan(routing="sparse", layers=(0,)).shards
    assert [shard.path for shard in shards] == [
        "attn/layer_00.mlpackage",
        "experts/layer_00.mlpackage",
    ]
    experts = shards[1]
    assert experts.experts == tuple(range(128)) and experts.weight_bytes == 128 * 3 * 2048 * 768 * 2
    assert len(experts.functions) == 128 * 3
    assert ("expert_127_t16", 16, (127,)) in [
        (f.name, f.tokens, f.experts) for f in experts.functions
    ]
    assert len(set(experts.graphs.values())) == 1  # one template for all
    assert (
        str(experts.sources["expert_050/experts.0.up.weight"].name)
        == "layers.0.ffn.experts.50.up.weight"
    )
    assert str(shards[0].sources["ffn.router.weight"].name) == "layers.0.ffn.router.weight"
    assert str(shards[0].sources["attn.q.weight"].name) == "layers.0.attn.q.weight"


def test_groups_of_experts_are_named_by_their_first_and_the_last_may_be_smaller():
    experts = plan(
        routing="sparse", experts_per_function=50, expert_tokens=(4,), layers=(0,)
    ).shards[1]
    assert [function.name for function in experts.functions] == [
        "expert_000_t4",
        "expert_050_t4",
        "expert_100_t4",
    ]
    assert [graph.block.size for graph in experts.graphs.values()] == [50, 50, 28]
    assert (
        str(experts.sources["expert_100/experts.27.down.weight"].name)
        == "layers.0.ffn.experts.127.down.weight"
    )


def test_expert_packages_stay_below_the_limit_of_a_weight_file(monkeypatch):
    one = 3 * 2048 * 768 * 2
    monkeypatch.setattr(
        planning, "MAX_WEIGHT_BYTES", 40 * one + 1000
    )  # 39 fit, with what the file adds
    parts = [
        shard
        for shard in plan(routing="sparse").shards
        if shard.kind == "experts" and shard.layer == 1
    ]
    assert [shard.path for shard in parts] == [
        f"experts/layer_01_part_{n}.mlpackage" for n in (1, 2, 3, 4)
    ]
    assert [len(shard.experts) for shard in parts] == [32] * 4 and {
        shard.parts for shard in parts
    } == {4}
    assert sorted(expert for shard in parts for expert in shard.experts) == list(range(128))


def test_token_counts_of_expert_functions_are_parsed_and_checked():
    assert parse_counts("64, 1,16,1", "--expert-tokens", 1) == (1, 16, 64)
    for text in ("", "0", "1,,2", "a", "-1", "1.5", "123456"):
        with pytest.raises(UserError, match="expert-tokens"):
            parse_counts(text, "--expert-tokens", 1, 16384)
    for options in (
        {"expert_tokens": ()},
        {"expert_tokens": (4, 1)},
        {"expert_tokens": (0, 1)},
        {"experts_per_function": 0},
    ):
        with pytest.raises(UserError):
            plan(routing="sparse", **options)


@pytest.mark.parametrize(
    "more", [{"calibrate": "builtin"}, {"budget_mb": 1.0}, {"min_cosine": 0.9}]
)
def test_what_is_taken_from_running_the_model_reads_the_layers_before_too(more):
    few = ConvertOptions(layers=(1, 3))
    assert few.layers_read(golden=False) == (1, 3)
    assert list(few.layers_read(golden=True)) == [0, 1, 2, 3]
    assert list(dataclasses.replace(few, **more).layers_read(golden=False)) == [0, 1, 2, 3]
    assert ConvertOptions(**more).layers_read(golden=True) is None
