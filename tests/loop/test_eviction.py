"""Policies of the expert cache, against a search of all ways to drop and counts by hand."""

import json
from functools import cache
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from ane_moe.cli import app
from ane_moe.errors import UserError
from ane_moe.loop.eviction import POLICIES
from ane_moe.loop.expert_cache import Eviction, ExpertCache, FunctionKey
from ane_moe.routing.cache_study import PERFECT, PREDICTORS, Machine, guessed, play, study
from ane_moe.routing.routing_trace import LayerRouting, RoutingTrace, write_trace
from ane_moe.routing.traffic import BELADY, PlayedCache, function_calls, played

SIZE = 1000
EVERY = (BELADY, *POLICIES)
MACHINE = Machine(1.0, 0.001, 0.0, 1)  # an expert is read in 1 ms


def random_trace(seed, tokens=12, layers=3, experts=4, k=2, sizes=(SIZE,)):
    random = np.random.default_rng(seed)
    weights = np.full((tokens, k), 1 / k, np.float32)
    found = {}
    for layer in range(layers):
        likely = random.dirichlet(np.ones(experts))
        chosen = [random.choice(experts, k, replace=False, p=likely) for _ in range(tokens)]
        size = sizes[layer % len(sizes)]
        found[2 * layer] = LayerRouting(experts, np.array(chosen, np.int16), weights, size, size)
    return RoutingTrace("x", "test", np.arange(tokens, dtype=np.int32), np.array([0]), found)


def fewest_misses(events, slots):
    """By trying all that can be dropped, which is never what a layer calls itself."""

    @cache
    def best(place, held):
        if place == len(events):
            return 0
        own = events[place]
        others = held - own
        room = min(slots - len(own), len(others))
        kept = map(frozenset, combinations(sorted(others), room))
        return len(own - held) + min(best(place + 1, own | rest) for rest in kept)

    return best(0, frozenset())


@given(seed=st.integers(0, 999), slots=st.integers(2, 5))
@settings(max_examples=25, deadline=None)
def test_belady_misses_as_little_as_is_possible(seed, slots):
    calls = function_calls(random_trace(seed, tokens=5, layers=2, experts=3))
    events = tuple(frozenset(functions) for _, functions in calls)
    assert played(calls, slots * SIZE, BELADY).misses == fewest_misses(events, slots)


@given(
    seed=st.integers(0, 999),
    slots=st.integers(1, 12),
    layers=st.integers(1, 4),
    k=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_belady_is_never_beaten_and_every_call_is_counted(seed, slots, layers, k):
    calls = function_calls(random_trace(seed, layers=layers, k=k))
    found = {name: played(calls, slots * SIZE, name) for name in EVERY}
    assert all(one.hits + one.misses == 12 * layers * k for one in found.values())
    assert all(one.misses >= found[BELADY].misses for one in found.values())


@pytest.mark.parametrize("policy", EVERY)
@given(seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_room_for_all_leaves_compulsory_misses_only(policy, seed):
    calls = function_calls(random_trace(seed, sizes=(SIZE, 3 * SIZE)))
    called = len({call for _, functions in calls for call in functions})
    for limit in (int(calls.sizes.sum()), None):
        assert played(calls, limit, policy).misses == called


@pytest.mark.parametrize("policy", EVERY)
@given(seed=st.integers(0, 99), spare=st.integers(0, 3))
@settings(max_examples=10, deadline=None)
def test_a_layers_own_experts_do_not_evict_one_another(policy, seed, spare):
    calls = function_calls(random_trace(seed, k=3))
    cache = PlayedCache((3 + spare) * SIZE, calls.sizes, calls.policy(policy))
    for layer, functions in calls:
        cache.begin(layer, functions)
        for function in functions:
            cache.call(function)
        assert cache.held[functions].all()


@pytest.mark.parametrize("policy", POLICIES)
def test_the_real_cache_keeps_what_a_layer_needs(policy):
    keys = {
        FunctionKey("p", name): layer
        for layer, names in enumerate(("abc", "xyz"))
        for name in names
    }
    loads = []
    cache = ExpertCache(
        lambda key: loads.append(key.name) or key, lambda key: 10, 30, Eviction(keys, policy)
    )
    for layer, names in ((0, "abc"), (1, "xyz"), (0, "cab")):
        own = [FunctionKey("p", name) for name in names]
        with cache.running(layer, own):
            for key in own:
                with cache.hold(key):
                    pass
    assert loads == [*"abcxyzcab"]  # each layer drives out the other, never itself


def test_policies_by_hand():
    """Layer 0 has functions 0 to 2, layer 1 has 3 and 4, layer 2 has 5."""
    order = {}
    for name, make in POLICIES.items():
        policy = make([0, 0, 0, 1, 1, 2])
        for layer, calls in ((0, [0, 0, 1]), (1, [3]), (2, [5]), (0, [2]), (1, [])):
            policy.begin(layer)
            for function in calls:
                policy.called(function)
        order[name] = np.argsort(policy.ranks(), kind="stable").tolist()
    assert order["lru"] == [4, 0, 1, 3, 5, 2]  # 4 was never used
    assert order["lfu"] == [4, 1, 3, 5, 2, 0]
    # Layer 1 runs: its own are needed again last, then those of layer 0, then layer 2's.
    assert order["layer-distance"] == [4, 3, 0, 1, 2, 5]
    # Uncalled in this pass: 4, 0, 1, 3. Called in it: 2. Still to come: 5.
    assert order["least-stale"] == [4, 0, 1, 3, 2, 5]


def test_an_unknown_policy_is_a_users_error():
    with pytest.raises(UserError, match="expert policy"):
        Eviction({}, "fifo")
    with pytest.raises(UserError, match="expert policy"):
        played(function_calls(random_trace(0)), None, "fifo")


# -- the study
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", EVERY)
@given(seed=st.integers(0, 99), slots=st.integers(2, 12))
@settings(max_examples=10, deadline=None)
def test_without_guesses_a_study_counts_and_waits_for_each_miss(policy, seed, slots):
    calls = function_calls(random_trace(seed))
    row, traffic = play(calls, slots * SIZE, policy, MACHINE), played(calls, slots * SIZE, policy)
    assert (row.hits, row.late, row.misses) == (traffic.hits, 0, traffic.misses)
    assert row.bytes_loaded_per_token == traffic.bytes_loaded_per_token
    assert row.stalled_ms_per_token * 12 == pytest.approx(traffic.misses)
    assert row.ms_per_token == pytest.approx(row.stalled_ms_per_token + 3)


@given(seed=st.integers(0, 999), slots=st.integers(1, 12), wrong=st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_guesses_of_any_kind_lose_no_call(seed, slots, wrong):
    calls = function_calls(random_trace(seed))
    random = np.random.default_rng(seed)
    guesses = [random.integers(0, 12, wrong).tolist() for _ in calls]
    row = play(calls, slots * SIZE, "lru", MACHINE, "random", guesses)
    assert row.hits + row.late + row.misses == 12 * 3 * 2
    assert row.bytes_unused_per_token <= row.bytes_loaded_per_token


def test_perfect_guesses_leave_the_first_layer_to_miss_where_there_is_time():
    calls = function_calls(random_trace(3))
    fast = Machine(compute_ms=10, read_gb_s=0.001, latency_ms=0, readers=1)
    row = play(calls, 12 * SIZE, "lru", fast, PERFECT, [functions for _, functions in calls])
    assert (row.misses, row.late) == (2, 0) and row.bytes_unused_per_token == 0


def test_guesses_on_a_trace_by_hand():
    weights = np.full((3, 2), 0.5, np.float32)
    layers = {
        0: LayerRouting(3, np.array([[0, 1], [0, 2], [1, 2]], np.int16), weights, 1, 1),
        1: LayerRouting(3, np.array([[1, 2], [0, 1], [1, 2]], np.int16), weights, 1, 1),
    }
    trace = RoutingTrace("x", "test", np.arange(3, dtype=np.int32), np.array([0]), layers)
    calls = function_calls(trace)
    by = {name: guessed(calls, make({0: 3, 1: 3})) for name, make in PREDICTORS.items()}
    assert by["previous"] == [[], [], [0, 1], [4, 5], [0, 2], [3, 4]]
    assert by["static"] == [[], [], [0, 1], [4, 5], [0, 1], [4, 3]]
    assert by["layer"] == [[], [3, 4], [0, 1], [3, 5], [0, 2], [4, 5]]


def test_a_study_has_a_row_for_each_policy_predictor_and_capacity():
    found = study(random_trace(5), MACHINE, shares=(0.25, 1.0))
    kinds = {(row.policy, row.predictor, row.share) for row in found.rows}
    assert len(kinds) == len(found.rows) == 2 * (len(EVERY) + 4)
    assert found.compulsory <= 12 and found.tokens == 12
    for row in found.rows:
        if row.predictor == "none":
            assert row.of_belady is None or row.of_belady <= 1
    best = [row for row in found.rows if row.policy == BELADY]
    assert all(row.of_belady == 1 for row in best if row.hits)


def test_the_command_prints_tables_a_plot_and_json(tmp_path):
    write_trace(random_trace(1), tmp_path / "trace.npz")
    arguments = ["cache-study", str(tmp_path / "trace.npz"), "--capacities", "0.5,1"]
    result = CliRunner().invoke(app, [*arguments, "--plot", str(tmp_path / "plot.svg")])
    assert "belady" in result.stdout and "PREDICTED" in result.stdout
    assert (tmp_path / "plot.svg").read_text().startswith("<svg")
    document = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert document["tokens"] == 12 and {row["share"] for row in document["rows"]} == {0.5, 1.0}
    for wrong in ("0", "2", "x", ""):
        result = CliRunner().invoke(app, [*arguments, "--capacities", wrong])
        assert isinstance(result.exception, UserError)
