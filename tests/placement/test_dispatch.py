"""Placement as Core ML decides it, held against 482 graphs that somebody else had it decide."""

from collections import Counter

import pytest

from ane_moe.placement import estimates
from ane_moe.placement.dispatch import Choice, dispatch
from ane_moe.placement.estimates import Estimate, EstimateBook, RunCost, estimate_book
from ane_moe.placement.facts import function_facts
from ane_moe.placement.predicted import predict
from ane_moe.placement.published.dispatched import (
    CHIP,
    SYSTEM,
    dispatched_graphs,
    dispatched_outcomes,
)
from ane_moe.placement.published.graphs import Graph
from ane_moe.placement.targets import find_target

TIES = 41  # graphs whose last operation is as dear on either side, and was left on the CPU
NOT_MODELLED = {"lstm", "gru", "rnn"}  # never on the engine; their CPU estimates are not understood
RUN = RunCost(0.25, 0.25, 0.125)


def choices(*saved: float | None) -> list[Choice]:
    """Operations by what the engine saves; None: not legal there."""
    return [Choice(ms is not None, (Estimate(0.0, ms or 0.0, ms or 0.0),)) for ms in saved]


def placed(*saved: float | None, run: RunCost = RUN) -> str:
    found = dispatch(choices(*saved), run)
    letters = {(True, True): "A", (False, True): "?", (False, False): "C"}
    return "".join(letters[both] for both in zip(found.surely, found.possibly, strict=True))


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        ((0.2544,), "A"),  # a convolution of 24 x 1, on the engine
        ((0.180,), "C"),  # of 17 x 1, on the CPU
        ((0.13, 0.13), "AA"),
        ((0.13, -0.1, 0.13), "CCC"),
        ((0.3, -0.1, 0.3), "AAA"),
        ((0.3, -0.3, 0.3), "ACA"),
        ((0.3, None, 0.3), "ACA"),
        ((0.6, -0.05), "AC"),
        ((0.6, 0.0), "A?"),  # a last relu
        ((None, 0.3), "C?"),  # after a CPU head a run may cost 0.375
        ((None, 0.4), "CA"),
    ],
)
def test_a_run_on_the_engine_has_to_save_what_it_costs(saved, expected):
    assert placed(*saved) == expected


def test_a_low_price_speaks_for_a_run_and_for_parting_one():
    old = RunCost(0.14, 0.25, 0.125)
    assert placed(0.2, run=old) == "?" and placed(1.0, -0.2, 1.0, run=old) == "A?A"


def test_what_is_not_known_is_decided_both_ways():
    known, other = Estimate(0.1, 0.5, 0.6), Estimate(0.1, 0.2, 0.2)
    open_one = dispatch([Choice(True, (known, other))], RUN)
    assert (open_one.surely, open_one.possibly) == ((False,), (True,))
    assert open_one.stretches[0].margin_ms == pytest.approx((-0.15, 0.15), abs=1e-6)
    carried = dispatch([*choices(1.0), Choice(True, (known, known.without_saving))], RUN)
    assert carried.surely == (True, True)


def test_of_482_published_graphs_none_is_placed_otherwise():
    grades = Counter(row.grade for row in dispatched_outcomes())
    assert grades["wrong"] == 0 and grades["uncertain"] <= TIES
    assert grades["right"] + grades["uncertain"] == 482


def test_what_is_undecided_there_is_decided_by_equal_costs_alone():
    rows = [row for row in dispatched_outcomes() if row.grade == "uncertain"]
    undecided = [op for row in rows for op in row.function.ops if op.verdict == "uncertain"]
    assert undecided and all(op.equal and op.op_type == "relu" for op in undecided)


MUTATIONS = {
    "a run costs half": lambda tables: tables["run"][0].update(ms=[0.125, 0.125]),
    "a run costs a half more": lambda tables: tables["run"][0].update(ms=[0.375, 0.375]),
    "a leaf of convolutions": lambda tables: _leaf(tables, "conv", 2).update(rate=[700, 700, 700]),
    "a leaf of linear": lambda tables: _leaf(tables, "linear", 1).update(rate=[60, 50, 50]),
    "a leaf of transpose": lambda tables: _leaf(tables, "transpose", 0).update(rate=[1, 50, 50]),
}


def _leaf(tables, kind, number):
    return [row for row in tables["leaf"] if kind in row["ops"]][number]


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_price_or_leaf_fails_the_back_test(mutation, monkeypatch):
    tables = estimates.load_estimates.__wrapped__()
    MUTATIONS[mutation](tables)
    monkeypatch.setattr(estimates, "load_estimates", lambda: tables)
    grades = Counter(row.grade for row in dispatched_outcomes())
    assert grades["wrong"] > 0 or grades["uncertain"] > TIES


def priced():
    """Every operation of the published graphs, as published and as we estimate it."""
    book = estimate_book(find_target(CHIP, SYSTEM))
    for graph in dispatched_graphs():
        ops = function_facts(graph.program(), "main").ops
        if not NOT_MODELLED & {entry["type"] for entry in graph.operations}:
            yield graph, [book.candidates(op.facts)[0] for op in ops]


def test_estimates_are_those_that_core_ml_printed():
    """72 distinct operations on three backends, from its own files."""
    compared = 0
    for graph, found in priced():
        for entry, ours in zip(graph.operations, found, strict=True):
            pairs = zip(entry.get("published_ms", ()), ours.times, strict=False)
            for published, mine in ((a, b) for a, b in pairs if a is not None):
                assert mine == pytest.approx(published, rel=2e-4, abs=1e-8), (graph.name, entry)
                compared += 1
    assert compared > 3000


def test_shares_of_the_cost_are_those_of_the_compute_plans():
    for graph, found in priced():
        sides = zip(found, graph.placed, strict=True)
        costs = [ours.ane_ms if side == "A" else ours.bnns_ms for ours, side in sides]
        for cost, share in zip(costs, graph.shares, strict=True):
            assert share is None or cost / sum(costs) == pytest.approx(share, abs=3e-4), graph.name


def predicted(program, target="m4", os=27):
    (function,) = predict([(program, "p")], find_target(target, os)).functions
    return function


def test_what_core_ml_simplifies_is_not_counted():
    g = Graph(weights="fp16")
    x = g.same("relu", g.same("relu", g.conv(g.input("x", (1, 2048, 1, 1)), 4096)))
    one = g.op("fill", (1, 4096, 1, 1), shape=[1, 4096, 1, 1], value=1.0)
    function = predicted(g.program(g.same("mul", x, g.same("add", one, one))))
    assert [op.op_type for op in function.ops] == ["conv", "relu", "mul"]
    assert function.verdict == "ane"


# Weights of one layer from which it goes to the engine alone, for one token
# (ane-engine study: 3.6 M on an M2, M4 and M6, 4.2 M on an M1, 10.1 M on an M5; linear 24.2 M).
@pytest.mark.parametrize(
    ("kind", "target", "millions"),
    [
        ("conv", "m2", 3.6),
        ("conv", "m4", 3.6),
        ("conv", "m6", 3.6),
        ("conv", "m1", 4.2),
        ("conv", "m5", 10.1),
        ("linear", "m4", 24.2),
    ],
)
@pytest.mark.parametrize("weights", ["fp16", "int8"])
def test_one_layer_goes_to_the_engine_from_so_many_weights(kind, target, millions, weights):
    verdicts = []
    for factor in (0.95, 1.05):
        channels, g = 2048, Graph(weights=weights)
        width = round(millions * 1e6 * factor / channels)
        if kind == "conv":
            y = g.conv(g.input("x", (1, channels, 1, 1)), width)
        else:
            y = g.linear(g.input("x", (1, 1, channels)), width)
        verdicts.append(predicted(g.program(y), target).verdict)
    assert verdicts == ["cpu", "ane"]


def test_a_margin_says_what_would_turn_it():
    g = Graph(weights="int8")
    function = predicted(g.program(g.conv(g.input("x", (1, 1024, 1, 1)), 1024)))
    (stretch,) = function.stretches
    assert function.verdict == stretch.verdict == "cpu"
    low, high = stretch.margin_ms
    assert low == high == pytest.approx(2 * 1024**2 * (1 / 27.085213 - 1 / 471.180908) / 1e6 - 0.25)
    assert "2.5 M more weights" in stretch.turns


def test_chips_nobody_has_read_and_unknown_leaves_are_undecided():
    g = Graph(weights="int8")
    large = g.program(g.swiglu(g.input("x", (1, 2304, 1, 1)), 9216))
    g = Graph(weights="int8")
    lone = g.program(g.linear(g.input("x", (1, 1, 4096)), 8192))
    assert predicted(large, "iphone-a17").verdict == "uncertain"
    assert predicted(lone, "m4").verdict == "ane" and predicted(lone, "m5").verdict == "uncertain"


def test_a_leaf_of_another_chip_is_a_guess():
    """No transpose of an M5 was read: between those of other chips, and nothing saved."""
    facts = {"op": "transpose", "elements_first": 10**6, "arg_perm": (0, 1, 3, 2)}
    known, guessed = (estimate_book(find_target(chip, 27)) for chip in ("m4", "m5"))
    assert len(known.candidates(facts)) == 1 < len(guessed.candidates(facts))
    assert isinstance(guessed, EstimateBook)
