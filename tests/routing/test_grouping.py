"""Groups against all groupings there are, planted ones, and costs counted anew."""

import json
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ane_moe.errors import UserError
from ane_moe.forecast.chips import find_chip
from ane_moe.routing.function_size import choose_size
from ane_moe.routing.grouping import (
    Grouping,
    best_groups,
    calls,
    exchange_costs,
    gathered,
    group_experts,
    groups_of,
    index_order,
    read_grouping,
    write_grouping,
)
from ane_moe.routing.routing_trace import LayerRouting, RoutingTrace
from ane_moe.routing.traffic import expert_traffic, functions_called


def random_mask(seed, tokens, experts, k):
    """Skewed choices of k experts, bool `[N,E]`."""
    rng = np.random.default_rng(seed)
    scores = (
        rng.standard_normal((tokens, experts))
        + rng.standard_normal(experts)
        + rng.standard_normal((tokens, 3)) @ rng.standard_normal((3, experts))
    )
    mask = np.zeros((tokens, experts), bool)
    np.put_along_axis(mask, np.argsort(-scores, 1)[:, :k], True, 1)
    return mask


def trace_of(mask, expert_bytes=10):
    k = int(mask.sum(1).max())
    chosen = np.argsort(~mask, axis=1, kind="stable")[:, :k].astype(np.int16)
    weights = np.take_along_axis(mask, chosen.astype(int), 1).astype(np.float32)
    return RoutingTrace(
        "x",
        "test",
        np.zeros(len(mask), np.int32),
        np.zeros(1, np.int64),
        {0: LayerRouting(mask.shape[1], chosen, weights, expert_bytes)},
    )


@given(
    seed=st.integers(0, 10_000),
    experts=st.integers(2, 9),
    size=st.integers(1, 4),
    k=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_the_cost_of_every_exchange_is_what_counting_anew_gives(seed, experts, size, k):
    mask = random_mask(seed, 30, experts, min(k, experts))
    group = np.random.default_rng(seed).permutation(index_order(experts, size))
    costs = exchange_costs(mask, group)
    before = calls(mask, group) * len(mask)
    for a in range(experts):
        for b in range(experts):
            other = group.copy()
            other[a], other[b] = group[b], group[a]
            assert costs[a, b] == pytest.approx(calls(mask, other) * len(mask) - before)


@pytest.mark.parametrize(("experts", "size"), [(6, 2), (6, 3), (7, 3)])
@pytest.mark.parametrize("seed", range(6))
def test_the_best_of_all_groupings_is_found_or_nearly(experts, size, seed):
    mask = random_mask(seed, 200, experts, 2)
    shape = index_order(experts, size)
    best = min(calls(mask, np.array(order)) for order in set(permutations(shape.tolist())))
    found = calls(mask, best_groups(mask, size))
    assert best <= found <= best + 0.25 * (calls(mask, shape) - best) + 1e-9


def test_planted_groups_are_found_exactly():
    rng = np.random.default_rng(0)
    hidden = rng.permutation(index_order(24, 4))
    mask = np.stack([(hidden == rng.integers(6)) & (rng.random(24) < 0.8) for _ in range(400)])
    assert groups_of(best_groups(mask, 4)) == groups_of(hidden)


@given(seed=st.integers(0, 10_000), experts=st.integers(1, 20), size=st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_groups_have_their_sizes_and_are_never_worse_than_index_order_on_the_fit(
    seed, experts, size
):
    mask = random_mask(seed, 50, experts, min(3, experts))
    for group in (gathered(mask, size), best_groups(mask, size)):
        assert sorted(np.bincount(group)) == sorted(np.bincount(index_order(experts, size)))
    assert calls(mask, best_groups(mask, size)) <= calls(mask, index_order(experts, size)) + 1e-12


def test_the_gain_is_counted_on_tokens_left_out():
    mask = random_mask(3, 300, 8, 2)
    report = group_experts(trace_of(mask), 2)
    gain = report.gains[0]
    assert (report.tokens_fitted, report.tokens_left_out) == (200, 100)
    group = np.zeros(8, int)
    for number, members in enumerate(report.grouping.layers[0]):
        group[list(members)] = number
    assert gain.grouped == calls(mask[200:], group) and gain.fitted == calls(mask[:200], group)
    assert gain.index_order == calls(mask[200:], index_order(8, 2)) and gain.ungrouped == 2


def test_traffic_of_groups_counts_functions_and_their_bytes():
    mask = random_mask(4, 100, 6, 2)
    groups = {0: ((0, 3), (1, 5), (2, 4))}
    trace = trace_of(mask, expert_bytes=10)
    touched = np.stack([mask[:, list(group)].any(1) for group in groups[0]], 1)
    np.testing.assert_array_equal(functions_called(trace, 0, groups), touched)
    found = expert_traffic(trace, None, groups)
    assert found.functions_per_token == pytest.approx(touched.sum() / 100)
    assert found.bytes_read_per_token == pytest.approx(20 * touched.sum() / 100)
    assert (found.misses, found.bytes_loaded_per_token) == (3, pytest.approx(0.6))
    with pytest.raises(UserError, match="smaller than one"):
        expert_traffic(trace, 19, groups)
    with pytest.raises(UserError, match="does not say"):
        expert_traffic(trace_of(mask, expert_bytes=0), None)


def with_weights(trace, count):
    return replace(
        trace,
        layers={index: replace(one, expert_weights=count) for index, one in trace.layers.items()},
    )


def test_the_size_is_chosen_by_the_cost_of_calls_against_that_of_bytes():
    trace = trace_of(random_mask(5, 300, 16, 4))
    chip = find_chip("m4-max")
    tiny, huge = (
        choose_size(with_weights(trace, count), chip, "fp16") for count in (1000, 500_000_000)
    )
    assert tiny.report.grouping.experts_per_function == 16  # calls are all that costs
    assert huge.report.grouping.experts_per_function == 1  # bytes are all that costs
    for choice in (tiny, huge):
        assert [cost.experts_per_function for cost in choice.costs] == [1, 2, 4, 8, 16]
        best = min(choice.costs, key=lambda cost: cost.ms_per_token.expected)
        assert best.experts_per_function == choice.report.grouping.experts_per_function
    call = chip.range("launch_ms").expected + 0.139 + chip.range("expert_host_ms").expected
    streamed = 1000 * 2 / (chip.range("stream_gb_s").expected * 1e6)
    cost = tiny.costs[0]  # by hand: 4 calls of one expert, and the host's part
    assert cost.functions_per_token == pytest.approx(4)
    assert cost.ms_per_token.expected == pytest.approx(
        4 * (call + streamed) + chip.range("host_ms").expected
    )


def test_a_trace_without_sizes_gives_no_choice():
    with pytest.raises(UserError, match="how many weights"):
        choose_size(trace_of(random_mask(5, 30, 8, 2)), find_chip("m1"), "int8")


def test_a_grouping_reads_back_as_written(tmp_path):
    grouping = Grouping(2, {0: ((0, 3), (1, 2), (4,)), 7: ((0, 1),)})
    write_grouping(grouping, tmp_path / "grouping.json")
    assert read_grouping(tmp_path / "grouping.json") == grouping


@pytest.mark.parametrize(
    "groups",
    [
        [[0, 1], [1, 2]],
        [[0, 1], [3, 2, 4]],
        [[0], [1], [2, 3]],
        [[0, 2]],
        [],
        [[0, "1"]],
        [[0, 1.5]],
        5,
        [[0, 1], []],
    ],
)
def test_a_grouping_that_does_not_hold_every_expert_once_is_refused(tmp_path, groups):
    path = tmp_path / "grouping.json"
    path.write_text(json.dumps({"format": 1, "experts_per_function": 2, "layers": {"0": groups}}))
    with pytest.raises(UserError, match="cannot be read as a grouping"):
        read_grouping(path)


@pytest.mark.parametrize("size", [0, -1])
def test_senseless_sizes_are_refused(size):
    with pytest.raises(UserError):
        group_experts(trace_of(random_mask(0, 10, 4, 2)), size)
