"""The cost model against calculations by hand, its own published back-test, and shards that lie on
disk."""

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ane_moe.conversion.pipeline import convert, plan
from ane_moe.conversion.plan import ConvertOptions
from ane_moe.errors import UserError
from ane_moe.forecast.backtest import outcomes, summary
from ane_moe.forecast.chips import Range, chip_names, find_chip
from ane_moe.forecast.cost_model import PARTS, breakdown, predict
from ane_moe.forecast.engine_speed import clock_factor
from ane_moe.forecast.pieces import ExpertSet, Piece
from ane_moe.forecast.workload import (
    Calls,
    assemble,
    distinct_groups,
    workload_of,
    workload_of_plan,
)
from ane_moe.formats.recipe import find_format, find_recipe
from ane_moe.manifest import Manifest
from ane_moe.placement.targets import target_names
from scripts.backtest_cost_model import (
    COVERAGE,
    TABLE,
    before,
    held_out,
    table,
    unrelated,
    unseen,
)
from tests.models import make_model, save_checkpoint

ONCE = Range(1, 1, 1)


@dataclass(frozen=True)
class Traffic:
    functions_per_token: float
    bytes_loaded_per_token: float


def test_a_call_takes_what_a_calculation_by_hand_says():
    """1e9 weights of int8 on an M4 Max: 1 GB / 118.9 GB/s = 8.41 ms, 1e9 / 105e9 = 9.52 ms, so the
    rate decides; 10 MB of cache: 5.8 * 0.01 / 118.9 s = 0.488 ms; one call 0.35 ms; host 0.3 ms."""
    one = breakdown((Calls("attn", ONCE, 10**9, 10**9, "int8", 1, 10**7),), find_chip("m4-max"))
    found = {part: value.expected for part, value in one.parts.items()}
    assert found == pytest.approx(
        {
            "weights": 9.5238,
            "compute": 0,
            "calls": 0.41,
            "kv": 0.4878,
            "head": 0,
            "clock": 0,
            "host": 0.3,
            "loads": 0,
        },
        rel=1e-3,
    )
    assert one.per_token_ms.expected == pytest.approx(10.7216, rel=1e-3)
    assert one.tok_s.expected == pytest.approx(1000 / 10.7216, rel=1e-3)


def test_prefill_is_bound_by_computing():
    """64 tokens of 1e9 weights: 128 TFLOP/1000 at 11 TFLOPS = 11.64 ms a chunk, while fp16 streams
    2 GB in 16.8 ms: no excess. At 640 tokens: 116.4 - 16.8 = 99.5 ms of excess."""
    chip = find_chip("m4-max")
    short, long = (
        breakdown((Calls("dense", ONCE, 2 * 10**9, 10**9, "fp16", tokens),), chip, steps=tokens)
        for tokens in (64, 640)
    )
    assert short.parts["compute"].expected == 0
    assert long.parts["compute"].expected * 640 == pytest.approx(116.36 - 16.82, rel=1e-3)


def test_the_chips_are_the_targets_of_placement_and_their_values_are_ordered():
    assert set(chip_names()) == set(target_names())
    for chip in map(find_chip, chip_names()):
        for name, value in chip.values.items():
            ends = value.range
            assert 0 < ends.low <= ends.expected <= ends.high, (chip.name, name)
            assert value.confidence in ("measured", "derived", "unknown") and value.source
    with pytest.raises(UserError, match="no such chip"):
        find_chip("m9")


WORK = st.tuples(
    st.sampled_from(["attn", "moe", "lm_head", "experts"]),
    st.integers(1, 10**9),
    st.integers(1, 64),
    st.integers(0, 10**8),
)


@given(
    st.lists(WORK, min_size=1, max_size=4),
    st.sampled_from(["m1", "m4-max", "m5-pro", "iphone-a17"]),
    st.sampled_from(["fp16", "int8", "lut4"]),
)
def test_every_prediction_is_a_range_and_more_work_is_never_faster(calls, chip, name):
    form = find_format(name)
    rate, size = form.rate, form.bits_per_weight / 8
    made = tuple(
        Calls(kind, ONCE, round(size * n), n, rate, tokens, cache)
        for kind, n, tokens, cache in calls
    )
    one, two = (breakdown(work, find_chip(chip)) for work in (made, made + made[:1]))
    for found in (one.per_token_ms, one.tok_s, *one.parts.values()):
        assert 0 <= found.low <= found.expected <= found.high
    assert set(one.parts) == set(PARTS)
    assert sum(part.expected for part in one.parts.values()) == pytest.approx(
        one.per_token_ms.expected
    )
    assert two.per_token_ms.expected > one.per_token_ms.expected


def test_distinct_groups_of_experts():
    """Top 8 of 128, one a function: 8 calls. Two a function: 64 * (1 - C(126,8)/C(128,8)) =
    7.78."""
    assert distinct_groups(ExpertSet(128, 8, 1, (1,)), 1) == Range(8, 8, 8)
    pairs = distinct_groups(ExpertSet(128, 8, 2, (1,)), 1)
    assert (pairs.low, pairs.high) == (4, 8) and pairs.expected == pytest.approx(7.7795, abs=1e-3)
    assert distinct_groups(ExpertSet(8, 2, 1, (1,)), 64).expected == pytest.approx(8, abs=1e-3)


@pytest.mark.parametrize(("routing", "recipe"), [("masked", "small"), ("sparse", "fp16")])
def test_a_conversion_costs_what_its_plan_said(tmp_path, routing, recipe):
    """Weights of compressed shards are counted from their bytes, which in tiny matrices are scales
    by a good part."""
    checkpoint = save_checkpoint(make_model("qwen2_moe"), tmp_path / "model")
    options = ConvertOptions(routing=routing, prefill=16, layers=(0,), recipe=find_recipe(recipe))
    planned = workload_of_plan(plan(checkpoint, options))
    convert(checkpoint, tmp_path / "out", options)
    found = workload_of(tmp_path / "out")
    assert sum(c.functions for c in found.chains) == sum(c.functions for c in planned.chains)
    if recipe == "fp16":
        assert replace(found, chains=planned.chains) == planned
    assert (
        found.package_bytes == planned.package_bytes
        and found.calls_per_token == planned.calls_per_token
    )
    for one, other in zip(found.decode, planned.decode, strict=True):
        assert (one.kind, one.rate, one.stored_bytes) == (
            other.kind,
            other.rate,
            other.stored_bytes,
        )
        assert other.weights <= one.weights <= 3 * other.weights
    shards = sum(path.stat().st_size for path in (tmp_path / "out").rglob("weight.bin"))
    assert 0.2 * shards < planned.package_bytes <= shards  # tiny tensors, each with its metadata


def test_compressed_weights_stream_fewer_bytes_at_their_own_rate(tmp_path):
    checkpoint = save_checkpoint(make_model("qwen2_moe"), tmp_path / "model")
    fp16, small = (
        workload_of_plan(plan(checkpoint, ConvertOptions(recipe=find_recipe(name))))
        for name in ("fp16", "small")
    )
    assert small.package_bytes < fp16.package_bytes
    assert {call.kind: call.rate for call in small.decode} == {
        "attn": "int8",
        "moe": "lut",
        "lm_head": "int8",
    }
    assert sum(call.weights for call in small.decode) == sum(call.weights for call in fp16.decode)


def test_traffic_replaces_the_guess():
    piece = Piece("experts", 10**9, 5 * 10**8, "fp16", experts=ExpertSet(128, 8, 1, (1,)))
    workload = assemble([piece], "sparse", "fp16", 0, 0)
    chip = find_chip()
    guess, counted = (
        predict(workload, chip),
        predict(workload, chip, traffic=Traffic(4, 65 * 10**6)),
    )
    assert counted.decode.parts["calls"].expected == pytest.approx(
        guess.decode.parts["calls"].expected / 2
    )
    assert counted.decode.parts["loads"].expected == pytest.approx(100)  # 65 MB at 0.65 GB/s
    assert counted.bound == "loads"


def test_a_prediction_says_that_it_is_one():
    document = predict(
        assemble([Piece("attn", 10**9, 10**9, "int8")], "masked", "int8", 64, 10**6), find_chip()
    ).as_json()
    assert document["kind"] == "predicted" and "not measured" in document["note"]
    assert set(document["decode"]["tok_s"]) == {"low", "expected", "high"}


def test_memory_counts_a_copy_for_each_function():
    found = predict(
        assemble([Piece("attn", 10**9, 10**9, "int8", 10**6)], "masked", "int8", 64, 10**7),
        find_chip(),
    ).memory_bytes
    assert found == Range(1_011_000_000, 2_011_000_000, 2_011_000_000)


def test_formats_take_what_coremltools_stores():
    """int8: a fp16 scale a row of 4096; lut4: palettes of 16 fp16 values for 16 rows."""
    forms = [find_format(name) for name in ("fp16", "int8", "lut4", "apple2")]
    assert [form.bits_per_weight for form in forms[:3]] == [
        16,
        8 + 16 / 4096,
        4 + 256 / (16 * 4096),
    ]
    assert [form.rate for form in forms] == ["fp16", "int8", "lut", "lut"]
    with pytest.raises(UserError):
        find_format("fp8")


def test_unknown_weights_have_no_price():
    manifest = Manifest(
        "demo",
        8,
        8,
        (0,),
        1,
        8,
        32,
        "masked",
        "mlstate",
        "bc1s",
        0,
        "mine",
        False,
        "embed.bin",
        {},
        (),
    )
    with pytest.raises(UserError, match="strange"):
        workload_of(replace(manifest, embed_format="strange"))
    assert workload_of(manifest).embed_bytes == 128


def test_the_ranges_hold_what_they_promise_and_the_page_says_so():
    rows = outcomes()
    found = summary(held_out(rows))
    assert found.coverage >= COVERAGE and found.rows >= 20
    assert TABLE.text == f"{table(rows)}\n"


@pytest.mark.parametrize("choose", [unseen, unrelated, held_out])
def test_the_model_is_better_than_the_one_before_it(choose):
    """On rows that neither took anything from, first of all."""
    rows = choose(outcomes())
    then, now = summary(before(rows)), summary(rows)
    assert len(rows) >= 15
    assert now.median_error < then.median_error and now.coverage > then.coverage


def test_a_row_that_nothing_was_taken_from_is_not_fitted():
    assert all(not (row.fitted or row.series) for row in unseen(outcomes()))
    assert all(row.source for row in outcomes())


@pytest.mark.parametrize(
    ("bits", "share"), [(16, 1), (8, 0.58), (6, 0.45), (4, 0.32), (3, 0.23), (2, 0.16)]
)
def test_weights_take_the_published_share_of_the_time_of_fp16(bits, share):
    """On an M6, and on an M4 but for 3 bits, which are widened to 4 there."""
    stored = 10**9 * bits // 8
    rate = "fp16" if bits == 16 else "int8" if bits == 8 else "lut"
    for name, published in (("m6", share), ("m4", 0.32 if bits == 3 else share)):
        found = breakdown((Calls("dense", ONCE, stored, 10**9, rate),), find_chip(name), host=False)
        plain = breakdown(
            (Calls("dense", ONCE, 2 * 10**9, 10**9, "fp16"),), find_chip(name), host=False
        )
        ratio = found.parts["weights"].expected / plain.parts["weights"].expected
        assert ratio == pytest.approx(published)


def test_sparse_weights_take_the_time_of_their_bytes():
    """Half of the weights left out, with a bit each for the mask: 0.56 of fp16's time."""
    form = find_format("sparse50")
    stored = round(10**9 * form.bits_per_weight / 8)
    one, all_ = (
        breakdown((Calls("dense", ONCE, size, 10**9, form.rate),), find_chip("m6"), host=False)
        for size in (stored, 2 * 10**9)
    )
    assert one.parts["weights"].expected / all_.parts["weights"].expected == pytest.approx(
        0.56, abs=0.01
    )


@pytest.mark.parametrize(("task_ms", "call_ms"), [(0.01, 0.17), (0.245, 0.178), (1, 0.351)])
def test_a_call_costs_more_the_longer_its_task(task_ms, call_ms):
    """The published sum of an M6: 31 us, and 0.139, 0.147 and 0.32 ms after the task."""
    stored = round(task_ms * 150e6)
    found = breakdown((Calls("dense", ONCE, stored, 1, "fp16"),), find_chip("m6"), host=False)
    assert found.parts["calls"].expected == pytest.approx(call_ms, rel=1e-3)


@pytest.mark.parametrize(("gap", "published_ms"), [(0.15, 2.1), (0.25, 3.45), (0.4, 4.45)])
def test_a_gap_on_the_host_slows_the_engine_down(gap, published_ms):
    """Calls of 1.27 ms of work and 0.35 ms beside it, on an M6; nobody saw it elsewhere."""
    factor = clock_factor(gap, 1.27, "m6", "expected")
    assert 1.27 * factor + 0.35 == pytest.approx(published_ms, rel=0.02)
    assert clock_factor(0.05, 1.27, "m6", "expected") == 1
    assert clock_factor(gap, 12.7, "m6", "expected") == 1  # a long task bears it
    assert clock_factor(gap, 1.27, "m4", "expected") == 1 < clock_factor(gap, 1.27, "m4", "slow")


def test_two_engines_serve_different_experts_only():
    chip, experts = find_chip("m6"), Piece("experts", 10**9, 5 * 10**8, "fp16")
    experts = replace(experts, experts=ExpertSet(128, 8, 1, (1,)))
    rest = Piece("attn", 10**9, 5 * 10**8, "fp16")
    workload = assemble([experts, rest], "sparse", "fp16", 0, 0)
    one, two = (predict(workload, chip, concurrency=number).decode.parts for number in (1, 2))
    alone = predict(assemble([rest], "sparse", "fp16", 0, 0), chip).decode.parts
    of_experts = one["weights"].expected - alone["weights"].expected
    gained = one["weights"].expected - two["weights"].expected
    assert gained == pytest.approx(of_experts * (1 - 1 / 1.36))
    assert find_chip("m4").range("concurrent_gain").expected < 1.1  # one engine
