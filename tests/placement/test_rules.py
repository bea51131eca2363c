"""The rules as data, the conditions they are written in, and the targets they are evaluated for."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ane_moe.errors import UserError
from ane_moe.placement.facts import FACTS
from ane_moe.placement.predicate import compile_condition, names_in
from ane_moe.placement.published.backtest import outcomes
from ane_moe.placement.published.points import POINTS
from ane_moe.placement.rules import (
    CONFIDENCES,
    RULES,
    Rule,
    RuleBook,
    facts_named,
    load_rules,
    rule_book,
)
from ane_moe.placement.targets import SYSTEMS, find_target, target_names


def rule(**fields) -> Rule:
    return Rule(
        **{
            "id": "r",
            "scope": "op",
            "claim": "cpu",
            "reason": "because",
            "source": "someone",
            "confidence": "measured",
            "remedy": "do not",
            **fields,
        }
    )


def holds(rule: Rule, facts: dict, target: str = "m4-max", os: int = 26) -> bool:
    book = RuleBook((rule,), find_target(target, os))
    return bool(list(book.matching(rule.scope, facts)))


def test_every_rule_names_only_facts_of_its_scope():
    constants = {f"cap_{name}" for name in find_target().limits} | {"chip", "system"}
    for each in load_rules():
        unknown = facts_named(each) - FACTS[each.scope] - constants
        assert all(name.startswith("arg_") for name in unknown), (each.id, unknown)


def test_every_rule_has_reason_source_and_confidence_and_what_to_do_instead():
    for each in load_rules():
        assert each.reason and each.source and each.confidence in CONFIDENCES
        assert each.remedy or each.verdict == "ane", each.id


def test_evidence_of_the_contrary_makes_a_rule_uncertain_and_not_binding():
    assert rule().verdict == "cpu" and rule().binding
    contested = rule(against="someone else saw otherwise")
    assert contested.verdict == "uncertain" and not contested.binding
    assert not rule(confidence="reported").binding


def test_the_engine_knows_no_rule_by_name(monkeypatch):
    """Renaming every rule changes no verdict."""
    before = [row.predicted for row in outcomes(POINTS[:20])]
    rules = enumerate(load_rules())
    renamed = tuple(replace(each, id=f"rule-{number}") for number, each in rules)
    book = "ane_moe.placement.predicted.rule_book"
    monkeypatch.setattr(book, lambda target: RuleBook(renamed, target))
    assert [row.predicted for row in outcomes(POINTS[:20])] == before


@pytest.mark.parametrize(
    ("chips", "matching"),
    [
        ("all", {"m1", "m2", "m3", "m4-max", "m5", "iphone-a17"}),
        ("h13", {"m1"}),
        ("h13-h15", {"m1", "m2", "m3"}),
        ("h16+", {"m4-max", "m5", "iphone-a17"}),
        ("iphone", {"iphone-a17"}),
        ("h13, h17", {"m1", "m5"}),
        ("mac", {"m1", "m2", "m3", "m4-max", "m5"}),
    ],
)
def test_rules_hold_for_the_chips_they_name(chips, matching):
    names = ("m1", "m2", "m3", "m4-max", "m5", "iphone-a17")
    assert {name for name in names if holds(rule(chips=chips), {"op": "conv"}, name)} == matching


@pytest.mark.parametrize(
    ("os", "matching"),
    [("all", {15, 26, 27}), ("26+", {26, 27}), ("15", {15}), ("15-26", {15, 26})],
)
def test_rules_hold_for_the_systems_they_name(os, matching):
    assert {
        system for system in SYSTEMS if holds(rule(os=os), {"op": "conv"}, os=system)
    } == matching


def test_a_rule_holds_for_its_operations_only():
    assert holds(rule(ops=("topk",)), {"op": "topk"}) and not holds(
        rule(ops=("topk",)), {"op": "conv"}
    )
    assert holds(rule(), {"op": "anything"})


def test_generation_system_and_limits_of_the_chip_are_facts():
    newer = rule(when="chip > 13 and system >= 26")
    assert holds(newer, {"op": "conv"}, "m4") and not holds(newer, {"op": "conv"}, "m1")
    assert not holds(newer, {"op": "conv"}, "m4", 15)
    wide = rule(when="w > cap_axis_w")
    assert holds(wide, {"op": "conv", "w": 20000}, "m1") and not holds(
        wide, {"op": "conv", "w": 20000}, "m4"
    )


@pytest.mark.parametrize(
    "text",
    [
        "x > 1",
        "x in (1, 2)",
        "'a' in x",
        "not x > 1",
        "x[-1] != 0",
        "x % 32 != 0",
        "x > 1 and y > 2 or not z",
        "x + y * 2 - 1 > 3",
    ],
)
def test_a_comparison_with_an_unknown_fact_is_false(text):
    assert compile_condition(text)({}) is text.startswith("not") or "not z" in text


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "x.real > 1",
        "(lambda: 1)()",
        "[y for y in x]",
        "x > 1 > 0",
        "x(",
        "f'{x}'",
        "x if y else z",
        "x ** 9",
        "x := 1",
        "x[y]",
    ],
)
def test_conditions_take_nothing_beyond_their_subset(text):
    with pytest.raises(ValueError):
        compile_condition(text)


@settings(deadline=None, max_examples=100)
@given(st.integers(-50, 50), st.integers(-50, 50), st.integers(1, 9))
def test_conditions_mean_what_python_means(x, y, z):
    facts = {"x": x, "y": y, "z": z, "t": (x, y), "s": frozenset({x})}
    for text in (
        "x > y",
        "x + y * z - 1 <= 3",
        "x % z == 0",
        "x > y and not y > z or x == z",
        "t[-1] != 0 or t[0] >= 1",
        "x in s and y not in s",
        "x in (1, 2, 3)",
    ):
        assert compile_condition(text)(facts) is bool(eval(text, {}, facts)), text


def test_an_index_outside_a_tuple_is_unknown():
    assert not compile_condition("t[-6] > 0")({"t": (1, 2)}) and not compile_condition("t[0] > 0")(
        {"t": 3}
    )


def test_names_in_a_condition_are_found():
    assert set(names_in("a > 1 and b[0] in c")) == {"a", "b", "c"}


@pytest.mark.parametrize(
    "broken",
    [
        'verdict = "gpu"',
        'scope = "world"',
        'confidence = "sure"',
        'when = "x >"',
        'chips = "m4"',
        'remedy = ""',
    ],
)
def test_an_unsound_rule_is_an_error_when_loaded(tmp_path, broken):
    sound = {
        "id": '"r"',
        "scope": '"op"',
        "verdict": '"cpu"',
        "reason": '"r"',
        "source": '"s"',
        "remedy": '"d"',
        "confidence": '"measured"',
    }
    key, value = broken.split(" = ")
    path = tmp_path / "rules.toml"
    path.write_text(
        "[[rule]]\n" + "\n".join(f"{k} = {v}" for k, v in (sound | {key: value}).items())
    )
    with pytest.raises(ValueError):
        load_rules(path)


def test_two_rules_of_one_id_are_an_error(tmp_path):
    path = tmp_path / "rules.toml"
    path.write_text(
        RULES.read_text()
        + '\n[[rule]]\nid="conv"\nscope="op"\nverdict="ane"\nreason="r"\nsource="s"\n'
        'confidence="apple"\n'
    )
    with pytest.raises(ValueError, match="conv"):
        load_rules(path)


def test_every_target_has_a_book_and_unknown_ones_name_the_known():
    for name in target_names():
        for system in SYSTEMS:
            assert list(rule_book(find_target(name, system)).matching("op", {"op": "cond"}))
    with pytest.raises(UserError, match="m4-max"):
        find_target("m9")
    with pytest.raises(UserError, match="26"):
        find_target("m4", 14)


@pytest.mark.parametrize(
    ("surely", "possibly", "equal", "covered", "verdict"),
    [
        (True, True, False, True, "ane"),
        (False, False, False, True, "cpu"),
        (False, False, False, False, "cpu"),
        (False, True, False, True, "uncertain"),
        (False, True, True, True, "uncertain"),
        (False, True, False, False, "uncertain"),
    ],
)
def test_the_cost_decision_is_said_by_one_rule(surely, possibly, equal, covered, verdict):
    facts = {"surely": surely, "possibly": possibly, "equal": equal, "covered": covered}
    assert next(rule_book(find_target()).matching("segment", facts)).verdict == verdict
