"""Predictions held against published placements."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

from ane_moe.runtime.program import Program
from ane_moe.verification.placement import predict
from ane_moe.verification.placement_result import FunctionPlacement
from ane_moe.verification.targets import find_target
from tests.verify.published import POINTS, Point


@dataclass(frozen=True)
class Outcome:
    """`predicted`, by `rules`, over the operations that the report counted; `facts`: what the cost decision saw."""

    point: Point
    predicted: str
    grade: str
    rules: tuple[str, ...]
    facts: dict[str, float]


def outcomes(points: Iterable[Point] = POINTS) -> list[Outcome]:
    return [_outcome(point, _built(point)) for point in points]


@functools.cache
def _built(point: Point) -> Program:
    return point.build()


def table(rows: list[Outcome]) -> str:
    """Markdown, with the totals above."""
    totals = {grade: sum(row.grade == grade for row in rows) for grade in ("right", "wrong", "uncertain")}
    lines = [f"{len(rows)} placements: " + ", ".join(f"{count} {grade}" for grade, count in totals.items()) + ".", "",
             "| # | graph | for | reported | predicted | | deciding rules | source |",
             "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        point = row.point
        lines.append(f"| {point.number} | {point.what} | {point.target}, {point.os} | {point.reported} | "
                     f"{row.predicted} | {row.grade} | {', '.join(row.rules)} | {point.source} |")
    return "\n".join(lines)


def _outcome(point: Point, program: Program) -> Outcome:
    (function,) = predict([(program, point.number)], find_target(point.target, point.os)).functions
    predicted = _verdict(function, point)
    rules = tuple(dict.fromkeys(item.rule for item in function.findings
                               if item.verdict == "cpu" or item.verdict == predicted == "uncertain"))
    facts = {"weight_bytes": function.weight_bytes, "flops": function.flops, "reduction": function.reduction,
             "ops": len(function.ops)}
    return Outcome(point, predicted, _grade(predicted, point.reported), rules or ("cost-large",), facts)


def _verdict(function: FunctionPlacement, point: Point) -> str:
    verdicts = {op.verdict for op in function.ops if not point.counted or op.op_type in point.counted}
    if len(verdicts) == 1:
        return verdicts.pop()
    return "mixed" if "cpu" in verdicts else "uncertain"


def _grade(predicted: str, reported: str) -> str:
    if predicted == "uncertain":
        return "uncertain"
    return "right" if predicted == reported else "wrong"
