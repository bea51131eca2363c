"""Predicted placement: which engine each operation of a package would run on, by the rules of what
is legal and Core ML's own cost decision, on any machine."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ane_moe.mlprogram.program import Program
from ane_moe.mlprogram.reader import read_program
from ane_moe.placement import dispatch as dispatching
from ane_moe.placement.dispatch import Choice, Dispatch, dispatch
from ane_moe.placement.estimates import EstimateBook, estimate_book
from ane_moe.placement.facts import FunctionFacts, OpFacts, function_facts
from ane_moe.placement.result import (
    PREDICTED,
    Finding,
    FunctionPlacement,
    OpPlacement,
    PlacementReport,
    Stretch,
    worst_first,
)
from ane_moe.placement.rules import Rule, RuleBook, rule_book
from ane_moe.placement.targets import Target

NO_RULE = Rule(
    "no-rule",
    "op",
    "uncertain",
    "no rule speaks of this operation",
    "rules.toml",
    "folklore",
    remedy="measure on a Mac",
)


def predict(
    programs: Iterable[tuple[Program | Path, str]],
    target: Target,
    *,
    allow: tuple[str, ...] = (),
    require_measured: bool = False,
) -> PlacementReport:
    """Predict every function of every package, given as (program or path, name to report it under).

    `allow` lists operation types that may be off the engine. Raises UserError for what is not a
    sound ML Program.
    """
    book = rule_book(target)
    functions: list[FunctionPlacement] = []
    for package, name in programs:
        program = package if isinstance(package, Program) else read_program(package)
        functions += [
            judge(function_facts(program, function), name, book, allow)
            for function in program.functions
        ]
    return PlacementReport(
        PREDICTED, target.name, str(target.os), tuple(functions), require_measured
    )


def judge(
    function: FunctionFacts, path: str, book: RuleBook, allow: tuple[str, ...] = ()
) -> FunctionPlacement:
    """What the rules and the cost decision say of one function, whether its facts were read from a
    package or come from a plan."""
    prices = estimate_book(book.target)
    overall = [_finding(rule) for rule in book.matching("function", function.facts)]
    overall += [
        _finding(rule, facts["name"], facts["role"])
        for facts in function.features
        for rule in book.matching("feature", facts)
    ]
    findings = _reported(overall)
    decided = []  # by operation: the findings that hold for it
    for op in function.ops:
        decided.append(_of_op(op, book))
        findings += _reported(decided[-1])
    placed = _dispatched(function.ops, decided, prices)
    stretches = []
    for stretch in placed.stretches:
        costs = _costs(stretch, placed, book, prices)
        shown = _stretch(stretch, costs.values(), function.ops, prices)
        stretches.append(shown)
        for index in range(stretch.start, stretch.stop):
            decided[index].append(costs[_state(placed, index)])
        reported = _reported(list(costs.values()))
        findings += [replace(item, reason=f"{item.reason}; {shown.turns}") for item in reported]
    ops = tuple(
        _placed(op, [*overall, *found], equal)
        for op, found, equal in zip(function.ops, decided, placed.equal, strict=True)
    )
    return FunctionPlacement(
        path,
        function.name,
        ops,
        worst_first(findings),
        allow,
        function.facts["weight_bytes"],
        function.facts["flops"],
        tuple(stretches),
    )


def _of_op(op: OpFacts, book: RuleBook) -> list[Finding]:
    rules = list(book.matching("op", op.facts)) or [NO_RULE]
    return [_finding(rule, op.name, op.operation.type) for rule in rules]


def _placed(op: OpFacts, findings: list[Finding], equal: bool) -> OpPlacement:
    verdict = _worst(findings)
    rules = tuple(dict.fromkeys(finding.rule for finding in findings if finding.verdict == verdict))
    return OpPlacement(op.name, op.operation.type, verdict, rules=rules, equal=equal)


def _dispatched(ops: list[OpFacts], decided: list[list[Finding]], prices: EstimateBook) -> Dispatch:
    """The cost decision over what no rule takes off the engine."""
    choices = [
        Choice(_worst(found) != "cpu", prices.candidates(op.facts), op.count)
        for op, found in zip(ops, decided, strict=True)
    ]
    placed = dispatch(choices, prices.run)
    if prices.covered:
        return placed
    nowhere = (False,) * len(ops)
    return replace(placed, surely=nowhere, equal=nowhere)


def _state(placed: Dispatch, index: int) -> tuple[bool, bool, bool]:
    return placed.surely[index], placed.possibly[index], placed.equal[index]


def _costs(
    stretch: dispatching.Stretch, placed: Dispatch, book: RuleBook, prices: EstimateBook
) -> dict[tuple[bool, bool, bool], Finding]:
    """What the cost decision says of the operations of a stretch, by what became of them."""
    states = dict.fromkeys(_state(placed, index) for index in range(stretch.start, stretch.stop))
    names = ("surely", "possibly", "equal")
    facts = {state: dict(zip(names, state, strict=True)) for state in states}
    return {
        state: _finding(next(book.matching("segment", known | {"covered": prices.covered})))
        for state, known in facts.items()
    }


def _stretch(
    stretch: dispatching.Stretch,
    costs: Iterable[Finding],
    ops: list[OpFacts],
    prices: EstimateBook,
) -> Stretch:
    verdicts = {finding.verdict for finding in costs}
    verdict = next(name for name in ("ane", "uncertain", "cpu") if name in verdicts)
    shown = Stretch(
        ops[stretch.start].name,
        sum(op.count for op in ops[stretch.start : stretch.stop]),
        verdict,
        stretch.ane_ms,
        stretch.cpu_ms,
        stretch.margin_ms,
        "",
    )
    return replace(shown, turns=_turns(shown, prices))


def _turns(stretch: Stretch, prices: EstimateBook) -> str:
    """The margin, and what would turn the decision."""
    low, high = stretch.margin_ms
    missing = -low if stretch.verdict == "uncertain" else -high
    margin = (
        f"{stretch.ops} operations, {stretch.ane_ms:.3g} ms on the engine and "
        f"{stretch.cpu_ms:.3g} on the CPU by estimate, margin {stretch.margin} ms"
    )
    if missing <= 0:
        return margin
    weights = prices.weights_for(missing) / 1e6
    return f"{margin}: {weights:.2g} M more weights in 1x1 convolutions would put it there"


def _finding(rule: Rule, op: str | None = None, op_type: str | None = None) -> Finding:
    return Finding(
        op,
        op_type,
        rule.verdict,
        rule.id,
        rule.reason,
        rule.remedy,
        rule.source,
        rule.confidence,
        rule.against,
        rule.binding,
    )


def _reported(findings: list[Finding]) -> list[Finding]:
    """What is off the engine or may be, and advice on what is on it."""
    return [finding for finding in findings if finding.verdict != "ane" or finding.remedy]


def _worst(findings: list[Finding]) -> str:
    return min((finding.verdict for finding in findings), key=_order)


def _order(verdict: str) -> int:
    return ("cpu", "uncertain", "ane").index(verdict)
