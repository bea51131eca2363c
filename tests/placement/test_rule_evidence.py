"""Every rule and every estimate has a graph that shows it: a published placement, a planted
offender, or the smallest graph that it speaks of."""

from dataclasses import replace

import pytest

from ane_moe.mlprogram.program import Program
from ane_moe.mlprogram.reader import read_program
from ane_moe.placement.estimates import estimate_book, load_estimates
from ane_moe.placement.facts import function_facts
from ane_moe.placement.predicted import predict
from ane_moe.placement.published.dispatched import CHIP, SYSTEM, dispatched_graphs
from ane_moe.placement.published.graphs import Graph
from ane_moe.placement.published.points import POINTS
from ane_moe.placement.rules import load_rules, rule_book
from ane_moe.placement.targets import find_target
from tests.placement.offenders import OFFENDERS
from tests.placement.rule_graphs import ELSEWHERE, RULES, STORED

# Shown by a test of its own (test_placement.py): what one refused weight does to a function.
ELSEWHERE_TESTED = {"per-block-model", "vector-palette"}


def met(program: Program, target: str, os: int) -> set[str]:
    """Every rule that holds for anything of a program."""
    book, found = rule_book(find_target(target, os)), set()
    for name in program.functions:
        facts = function_facts(program, name)
        of = [("function", facts.facts), *(("feature", each) for each in facts.features)]
        of += [("op", op.facts) for op in facts.ops]
        found |= {rule.id for scope, each in of for rule in book.matching(scope, each)}
    (first, *_) = predict([(program, "p")], find_target(target, os)).functions
    return found | {rule for op in first.ops for rule in op.rules}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_speaks_of_the_graph_that_showed_it(rule):
    build, target, os = RULES[rule]
    assert rule in met(build(), target, os)
    if rule in ELSEWHERE:
        assert rule not in met(build(), *ELSEWHERE[rule])


@pytest.mark.parametrize("rule", STORED)
def test_a_rule_on_stored_weights_speaks_of_such_a_package(rule, tmp_path):
    build, target, os = STORED[rule]
    program = read_program(build(tmp_path / "net.mlpackage"))
    assert rule in met(program, target, os)
    if rule in ELSEWHERE:
        assert rule not in met(program, *ELSEWHERE[rule])


def test_the_longest_chain_that_compiles_breaks_no_rule():
    """386 convolutions compiled and 387 crashed (380 is the rule's, on the safe side); a chain of
    96 steps took seconds."""
    for rule, count in (("many-convolutions-m6", 380), ("long-chain-m6", 100)):
        g = Graph(weights="fp16")
        x = g.input("x", (1, 64, 1, 64))
        for _ in range(count):
            x = g.conv(x, 64) if rule.startswith("many") else g.same("sigmoid", x)
        assert rule not in met(g.program(x), "m6", 27)


@pytest.fixture(scope="module")
def shown() -> set[str]:
    by_points = [met(point.build(), point.target, point.os) for point in POINTS]
    of_study = [met(graph.program(), CHIP, SYSTEM) for graph in dispatched_graphs()]
    offended = {rule for rule, _ in OFFENDERS.values()}
    return set().union(offended, ELSEWHERE_TESTED, RULES, STORED, *by_points, *of_study)


def test_no_rule_is_without_a_graph(shown):
    assert [rule.id for rule in load_rules() if rule.id not in shown] == []


def test_a_rule_without_a_graph_would_be_listed(shown):
    new = replace(load_rules()[0], id="told-by-nobody")
    assert new.id not in shown
    assert {"many-convolutions-m6", "topk-slow", "conv-depthwise"} <= shown


# What the study prints for other chips: a 3x3 convolution of 64 channels over 32 x 32 in us on the
# engine, and the rates of one that reads more than it computes (GFLOP/s, engine and bnns).
CONVOLUTION_US = {"m1": 6.52, "m2": 4.67, "m4": 4.67, "m6": 4.67, "m5": 8.77}
LOW_LEAF = {"m1": (436.775, 31.3746), "m4": (471.180908, 27.085213), "m5": (417.729, 67.7735)}
MIDDLE_LEAF = {"m1": (5980.88, 298.105), "m4": (7160.830078, 388.061432), "m5": (5484.96, 243.095)}


def estimate(program: Program, chip: str, os: int = 27):
    (op,) = function_facts(program, "main").ops
    return op.facts, estimate_book(find_target(chip, os)).candidates(op.facts)


@pytest.mark.parametrize("chip", CONVOLUTION_US)
def test_a_convolution_is_estimated_as_published_for_each_chip(chip):
    g = Graph(weights="fp16")
    weight, x = g.weight((64, 64, 3, 3)), g.input("x", (1, 64, 32, 32))
    one = g.program(g.op("conv", (1, 64, 32, 32), x=x, weight=weight, pad_type="same"))
    _, (found, *others) = estimate(one, chip)
    assert not others and found.ane_ms * 1e3 == pytest.approx(CONVOLUTION_US[chip], rel=2e-3)


@pytest.mark.parametrize("chip", LOW_LEAF)
@pytest.mark.parametrize(("columns", "leaf"), [(1, LOW_LEAF), (16, MIDDLE_LEAF)])
def test_1x1_convolutions_have_the_published_leaves(chip, columns, leaf):
    g = Graph(weights="fp16")
    one = g.program(g.conv(g.input("x", (1, 512, 1, columns)), 512))
    facts, (found, *others) = estimate(one, chip)
    rates = [facts["flops"] / ms / 1e6 for ms in found.times[:2]]
    assert not others and rates == pytest.approx(leaf[chip], rel=1e-6)


def test_additions_and_products_have_the_published_leaves_of_an_m1_and_an_m5():
    g = Graph(weights="fp16")
    x = g.input("x", (1, 64, 32, 32))
    _, (added,) = estimate(g.program(g.same("add", x, x)), "m1")
    work = 2 * 64 * 32 * 32  # once: of both inputs, which are one
    rates = [2 * work / ms / 1e6 for ms in added.times[:2]]
    assert rates == pytest.approx((32.949, 14.555), rel=1e-3)
    g = Graph(weights="fp16")
    x, y = g.input("x", (1, 128, 256)), g.input("y", (1, 256, 128))
    facts, (product,) = estimate(g.program(g.matmul(x, y)), "m5")
    rates = [facts["flops"] / ms / 1e6 for ms in product.times[:2]]
    assert rates == pytest.approx((11245.8, 359.256), rel=1e-4)


def test_no_estimate_is_without_a_graph():
    """Rows of the M4 and macOS 27 are held against what Core ML printed (test_dispatch.py); those
    of other chips by the tests above; fused attention under OS 15 by the points 14a to 14c."""
    tables, of_study = load_estimates(), set()
    for graph in dispatched_graphs():
        of_study |= {entry["type"] for entry in graph.operations}
    other_chips = [row for row in tables["leaf"] if row.get("chips") in ("h13", "h17")]
    assert {(kind, row["chips"]) for row in other_chips for kind in row["ops"]} == {
        ("add", "h13"),
        ("sub", "h13"),
        ("conv", "h13"),
        ("conv", "h17"),
        ("matmul", "h17"),
    }
    priced = [kind for table in ("leaf", "traffic") for row in tables[table] for kind in row["ops"]]
    assert set(priced) - of_study == {"reduce_argmin"}  # as reduce_argmax, of which it is the twin
