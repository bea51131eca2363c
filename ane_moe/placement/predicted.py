"""Predicted placement: which engine each operation of a package would run on, by the rules, on any
machine."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ane_moe.mlprogram.program import Program
from ane_moe.mlprogram.reader import read_program
from ane_moe.mlprogram.weights import Part
from ane_moe.placement.facts import FunctionFacts, OpFacts, function_facts
from ane_moe.placement.result import (
    PREDICTED,
    Finding,
    FunctionPlacement,
    OpPlacement,
    PlacementReport,
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
    """What the rules say of one function, whether its facts were read from a package or come from a
    plan."""
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
    verdicts = [_worst(found) for found in decided]
    stretches = _segments(function.ops, verdicts)
    for stretch in stretches:
        facts = _segment_facts([function.ops[index] for index in stretch])
        cost = _sized(_finding(next(book.matching("segment", facts))), facts, len(stretches) > 1)
        findings += _reported([cost])
        for index in stretch:
            decided[index].append(cost)
    ops = tuple(
        _placed(op, [*overall, *found]) for op, found in zip(function.ops, decided, strict=True)
    )
    return FunctionPlacement(
        path,
        function.name,
        ops,
        worst_first(findings),
        allow,
        function.facts["weight_bytes"],
        function.facts["flops"],
        max((op.reduction for op in function.ops), default=0),
    )


def _of_op(op: OpFacts, book: RuleBook) -> list[Finding]:
    rules = list(book.matching("op", op.facts)) or [NO_RULE]
    return [_finding(rule, op.name, op.operation.type) for rule in rules]


def _placed(op: OpFacts, findings: list[Finding]) -> OpPlacement:
    verdict = _worst(findings)
    rules = tuple(dict.fromkeys(finding.rule for finding in findings if finding.verdict == verdict))
    return OpPlacement(op.name, op.operation.type, verdict, rules=rules)


def _segments(ops: list[OpFacts], verdicts: list[str]) -> list[list[int]]:
    """The operations that are not off the engine, in stretches (by index) that the engine could run
    in one call.

    Stretches are parted by the number of changes between CPU and engine on the longest way from an
    input. Even levels are the CPU's, so that what it computes before everything else splits
    nothing.
    """
    levels: list[int] = []
    for index, op in enumerate(ops):
        side = int(verdicts[index] != "cpu")
        levels.append(
            max(
                (levels[source] + ((levels[source] + side) % 2) for source in op.sources),
                default=side,
            )
        )
    stretches: dict[int, list[int]] = {}
    for index, level in enumerate(levels):
        if level % 2:
            stretches.setdefault(level, []).append(index)
    return list(stretches.values())


def _segment_facts(ops: list[OpFacts]) -> dict[str, Any]:
    parts: dict[Part, int] = {part: part[1] for op in ops for part in op.parts}
    return {
        "weight_bytes": sum(parts.values()),
        "flops": sum(op.flops for op in ops),
        "ops": sum(op.count for op in ops),
        "reduction": max((op.reduction for op in ops), default=0),
    }


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


def _sized(finding: Finding, facts: dict[str, Any], one_of_several: bool) -> Finding:
    """The finding with the sizes that decided it."""
    what = (
        f"{facts['weight_bytes'] / 1e6:.3g} MB of weights, {facts['flops'] / 1e9:.3g} GFLOP, sums "
        f"of up to "
        f"{facts['reduction']}, {facts['ops']} "
        f"operations{' in this stretch' if one_of_several else ''}"
    )
    return replace(finding, reason=f"{finding.reason} ({what})")


def _reported(findings: list[Finding]) -> list[Finding]:
    """What is off the engine or may be, and advice on what is on it."""
    return [finding for finding in findings if finding.verdict != "ane" or finding.remedy]


def _worst(findings: list[Finding]) -> str:
    return min((finding.verdict for finding in findings), key=_order)


def _order(verdict: str) -> int:
    return ("cpu", "uncertain", "ane").index(verdict)
