"""A plan is judged as its packages are: the same facts, so the same rules."""

from collections import Counter
from dataclasses import replace

import pytest

from ane_moe.conversion.pipeline import convert, plan
from ane_moe.conversion.plan import ConvertOptions
from ane_moe.forecast.concerns import concerns_of_plan
from ane_moe.forecast.planned_facts import facts_of_plan
from ane_moe.formats.recipe import find_recipe
from ane_moe.mlprogram.reader import read_program
from ane_moe.placement.facts import FEATURE_FACTS, FUNCTION_FACTS, function_facts
from ane_moe.placement.predicted import judge, predict
from ane_moe.placement.rules import rule_book
from ane_moe.placement.targets import find_target
from tests.models import make_model, save_checkpoint
from tests.placement.real_sizes import distinct_shards, plan_of, write_hollow

# Operations that the counts may be wrong by: renormalisation, soft routing, a layout's transposes.
SLACK = 13
# Between them every rule of chips and systems that our packages meet.
TARGETS = (("m1", 15), ("m4-max", 26), ("m5-max", 26), ("iphone-a17", 26))
# A layer's tree over its experts, a choice of soft routing, and a clamp or a gate more or less.
ROW_SLACK = 8
EXACT = FUNCTION_FACTS - {"ops", "weight_file_bytes", "elementwise_in_a_row"}
# Between them every kind of shard, every option that a rule looks at, and every part.
CASES = {
    "dense and experts": ("qwen3_moe", {"mlp_only_layers": [1]}, {}),
    "one by one": (
        "qwen2_moe",
        {"num_experts": 6, "num_experts_per_tok": 2},
        {"routing": "sparse", "state": "explicit", "expert_tokens": (1, 16)},
    ),
    "groups": (
        "mixtral",
        {},
        {"routing": "sparse", "experts_per_function": 2, "recipe": find_recipe("small")},
    ),
    "split and ranks": (
        "olmoe",
        {},
        {"layout": "bct1", "recipe": find_recipe("lut4", rank=4), "max_shard_mb": 0},
    ),
    "for the GPU": (
        "granitemoe",
        {"hidden_size": 64, "intermediate_size": 64},
        {"state": "explicit", "recipe": find_recipe("int4-block32")},
    ),
    "two layers in one": ("granitemoe", {}, {"routing": "soft", "layers_per_shard": 2}),
    "convolutions over tokens": ("lfm2_moe", {}, {}),
    "one router for all": ("omni_moe", {"expert_groups": [[2, 12]]}, {"layers_per_shard": 2}),
}


@pytest.fixture(scope="module", params=CASES)
def conversion(request, tmp_path_factory):
    """The plan of a tiny model, and the folder that was made by it."""
    family, config, asked = CASES[request.param]
    folder = tmp_path_factory.mktemp("planned")
    model = make_model(family, **{"num_hidden_layers": 2, **config})
    checkpoint = save_checkpoint(model, folder / "checkpoint")
    options = ConvertOptions(prefill=16, **asked)
    convert(checkpoint, folder / "out", options)
    return plan(checkpoint, options), folder / "out"


def assert_same_facts(planned, program):
    found = function_facts(program, planned.function.name)
    expected = {name: found.facts[name] for name in EXACT}
    assert {name: planned.facts.facts[name] for name in EXACT} == expected
    assert abs(planned.facts.facts["ops"] - found.facts["ops"]) <= SLACK * max(
        1, len(planned.shard.layers)
    )
    steps, counted = (f.facts["elementwise_in_a_row"] for f in (planned.facts, found))
    assert abs(steps - counted) <= ROW_SLACK * max(1, len(planned.shard.layers))
    assert planned.facts.facts["weight_file_bytes"] >= found.facts["weight_file_bytes"]
    assert max(op.reduction for op in planned.facts.ops) == max(op.reduction for op in found.ops)
    assert all(set(facts) <= FEATURE_FACTS for facts in planned.facts.features)
    assert _counted(planned.facts.features) == _counted(found.features)


def _counted(features):
    return Counter(tuple(sorted(facts.items(), key=str)) for facts in features)


def test_functions_have_the_facts_that_their_plan_says(conversion):
    planned, out = conversion
    functions = list(facts_of_plan(planned))
    assert {entry.shard.kind for entry in functions} == {shard.kind for shard in planned.shards}
    for entry in functions:
        assert_same_facts(entry, read_program(out / entry.shard.path))


def test_the_concerns_of_a_plan_are_those_that_its_packages_get(conversion):
    """Function by function and over all."""
    planned, out = conversion
    programs = {shard.path: read_program(out / shard.path) for shard in planned.shards}
    for target in (find_target(*chip) for chip in TARGETS):
        report = predict([(program, path) for path, program in programs.items()], target)
        met = {(row.path, row.function): _against(row) for row in report.functions}
        book = rule_book(target)
        for entry in facts_of_plan(planned):
            row = judge(entry.facts, entry.shard.path, book)
            assert _against(row) == met[row.path, row.function]
        concerns = {(c.rule, c.verdict) for c in concerns_of_plan(planned, target)}
        assert concerns == set().union(*met.values())


def _against(row):
    return {(item.rule, item.verdict) for item in row.findings if item.verdict != "ane"}


@pytest.mark.parametrize("model", ["OLMoE-1B-7B", "Mixtral-8x7B"])
def test_sizes_of_real_models_meet_the_same_rules(model, tmp_path):
    """Where the cost decision goes both ways. Weights are holes in the file; the graphs are
    real."""
    planned = plan_of(model)
    planned = replace(planned, shards=tuple(distinct_shards(planned)))
    verdicts = set()
    for shard in planned.shards:
        write_hollow(shard, tmp_path)
    for entry in facts_of_plan(planned):
        program = read_program(tmp_path / entry.shard.path)
        assert_same_facts(entry, program)
        for target in map(find_target, ("m1", "m4-max", "iphone-a17")):
            book = rule_book(target)
            real = judge(function_facts(program, entry.function.name), "", book)
            assert _against(judge(entry.facts, "", book)) == _against(real)
            verdicts |= {verdict for _, verdict in _against(real)} or {"ane"}
    assert {"ane", "uncertain"} <= verdicts


def test_functions_that_no_rule_tells_apart_are_judged_once():
    planned = plan_of("Qwen3-30B-A3B", routing="sparse")
    experts = [entry for entry in facts_of_plan(planned) if entry.shard.kind == "experts"]
    assert [entry.function.tokens for entry in experts] == [1, 16, 64]
    assert {entry.facts.facts["package_functions"] for entry in experts} == {128 * 3}
