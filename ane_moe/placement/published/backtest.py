"""Predictions held against published placements."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

from ane_moe.mlprogram.program import Program
from ane_moe.placement.predicted import predict
from ane_moe.placement.published.points import POINTS, Point
from ane_moe.placement.result import FunctionPlacement
from ane_moe.placement.targets import find_target


@dataclass(frozen=True)
class Outcome:
    """`predicted`, by `rules`, over the operations that the report counted. `margin`: of the
    stretch with most operations, in ms. `counts`: operations predicted on the engine, on the CPU,
    and undecided."""

    point: Point
    predicted: str
    grade: str
    rules: tuple[str, ...]
    margin: str
    counts: tuple[int, int, int]


def outcomes(points: Iterable[Point] = POINTS) -> list[Outcome]:
    return [_outcome(point, _built(point)) for point in points]


@functools.cache
def _built(point: Point) -> Program:
    return point.build()


def table(rows: list[Outcome]) -> str:
    """Markdown, with the totals above."""
    totals = {
        grade: sum(row.grade == grade for row in rows) for grade in ("right", "wrong", "uncertain")
    }
    graded = ", ".join(f"{count} {grade}" for grade, count in totals.items())
    lines = [
        f"{len(rows)} placements: {graded}.",
        *_of_plans([row for row in rows if row.point.on_cpu is not None]),
        "",
        "| # | graph | for | reported | predicted | | margin, ms | deciding rules | source |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        point = row.point
        reported, predicted = point.reported, row.predicted
        if point.on_cpu is not None:
            reported = _counted(sum(row.counts) - point.on_cpu, point.on_cpu)
            predicted = _counted(*row.counts)
        lines.append(
            f"| {point.number} | {point.what} | {point.target}, {point.os} | {reported} | "
            f"{predicted} | {row.grade} | {row.margin} | {', '.join(row.rules)} | {point.source} |"
        )
    return "\n".join(lines)


def _of_plans(rows: list[Outcome]) -> list[str]:
    """One line on the compute plans that were published whole."""
    if not rows:
        return []
    counts = [row.counts for row in rows]
    ane, cpu, undecided = (sum(column) for column in zip(*counts, strict=True))
    on_cpu = sum(row.point.on_cpu or 0 for row in rows)
    total = ane + cpu + undecided
    return [
        f"{len(rows)} of them are whole compute plans: of {total} operations {total - on_cpu} "
        f"were on "
        f"the engine and {on_cpu} on the CPU; predicted: {ane}, {cpu}, and {undecided} undecided."
    ]


def _counted(ane: int, cpu: int, undecided: int = 0) -> str:
    parts = ((ane, "ane"), (cpu, "cpu"), (undecided, "uncertain"))
    return ", ".join(f"{count} {verdict}" for count, verdict in parts if count)


def _outcome(point: Point, program: Program) -> Outcome:
    (function,) = predict([(program, point.number)], find_target(point.target, point.os)).functions
    predicted = _verdict(function, point)
    rules = tuple(
        dict.fromkeys(
            item.rule
            for item in function.findings
            if item.verdict == "cpu" or item.verdict == predicted == "uncertain"
        )
    )
    widest = max(function.stretches, key=lambda stretch: stretch.ops, default=None)
    margin = widest.margin if widest else ""
    ane, cpu, undecided = (function.count(verdict) for verdict in ("ane", "cpu", "uncertain"))
    grade = _grade(predicted, point.reported)
    if point.on_cpu is not None:
        grade = _grade_counts(ane, cpu, undecided, point.on_cpu)
    return Outcome(point, predicted, grade, rules or ("cost-large",), margin, (ane, cpu, undecided))


def _verdict(function: FunctionPlacement, point: Point) -> str:
    verdicts = {
        op.verdict for op in function.ops if not point.counted or op.op_type in point.counted
    }
    if len(verdicts) == 1:
        return verdicts.pop()
    return "mixed" if "cpu" in verdicts else "uncertain"


def _grade(predicted: str, reported: str) -> str:
    if predicted == "uncertain":
        return "uncertain"
    return "right" if predicted == reported else "wrong"


def _grade_counts(ane: int, cpu: int, undecided: int, on_cpu: int) -> str:
    """Wrong where no way to settle what is undecided gives the numbers that were measured."""
    if cpu > on_cpu or ane > ane + cpu + undecided - on_cpu:
        return "wrong"
    return "uncertain" if undecided else "right"
