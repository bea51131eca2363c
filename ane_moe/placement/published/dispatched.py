"""482 small graphs whose dispatch by Core ML was published, operation by operation.

`dispatched_graphs.json` has them, with source and licence. It does not say how they are wired, of
which the decision does not depend: an operation reads what the one before it gave where that is of
its type, and inputs of the function otherwise.
"""

import functools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ane_moe.mlprogram.program import Argument, Program, TensorType
from ane_moe.placement.predicted import predict
from ane_moe.placement.published.graphs import Graph, literal
from ane_moe.placement.result import FunctionPlacement
from ane_moe.placement.targets import find_target

GRAPHS = Path(__file__).with_name("dispatched_graphs.json")
CHIP, SYSTEM = "m4", 27


@dataclass(frozen=True)
class DispatchedGraph:
    """A graph and what Core ML made of it. `placed`: A (engine) or C (CPU) for each operation;
    `legal`: whether its segmenter lists the engine; `published_ms`: its estimates on engine, bnns
    and classic CPU, where they were read; `shares` of the cost, where they were published.
    """

    name: str
    wrapped: bool
    operations: tuple[dict[str, Any], ...]
    placed: str
    shares: tuple[float | None, ...]

    def program(self) -> Program:
        g = Graph(weights="fp16")
        last = ""
        for entry in self.operations:
            last = _add(g, entry, last)
        return g.program(last)


@dataclass(frozen=True)
class Dispatched:
    """A graph held against its prediction. `grade`: right; uncertain where Core ML took another of
    equal ways, or an operation is undecided for another reason; wrong."""

    graph: DispatchedGraph
    function: FunctionPlacement
    grade: str


@functools.cache
def dispatched_graphs() -> tuple[DispatchedGraph, ...]:
    data = json.loads(GRAPHS.read_text())
    return tuple(
        DispatchedGraph(
            row["name"],
            row["set"] == "ctx",
            tuple(data["operations"][index] for index in row["order"]),
            row["placed"],
            tuple(row["shares"]),
        )
        for row in data["graphs"]
    )


def dispatched_outcomes() -> list[Dispatched]:
    """All of them, predicted for the chip and system they were read on."""
    target = find_target(CHIP, SYSTEM)
    graphs = dispatched_graphs()
    report = predict(((graph.program(), graph.name) for graph in graphs), target)
    return [
        Dispatched(graph, function, _grade(graph, function))
        for graph, function in zip(graphs, report.functions, strict=True)
    ]


def dispatched_table(rows: list[Dispatched]) -> str:
    """Markdown: how many graphs, and how many of their operations, are placed as published."""
    lines = [
        f"{len(rows)} graphs: {_counted(Counter(row.grade for row in rows))}.",
        "",
        "| graphs | number | as predicted | operations |",
        "|---|---|---|---|",
    ]
    for name, wrapped in (("one operation alone", False), ("the same among others", True)):
        mine = [row for row in rows if row.graph.wrapped == wrapped]
        ops = Counter(grade for row in mine for grade in _op_grades(row))
        graded = _counted(Counter(row.grade for row in mine))
        lines.append(f"| {name} | {len(mine)} | {graded} | {_counted(ops)} |")
    return "\n".join(lines)


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[grade]} {grade}" for grade in ("right", "uncertain", "wrong"))


def _op_grades(row: Dispatched) -> Iterator[str]:
    for placed, op in zip(row.graph.placed, row.function.ops, strict=True):
        reported = "ane" if placed == "A" else "cpu"
        undecided = op.verdict == "uncertain"
        yield "uncertain" if undecided else "right" if op.verdict == reported else "wrong"


def _grade(graph: DispatchedGraph, function: FunctionPlacement) -> str:
    """Where the costs of two ways are equal, the one that keeps on the engine counts as
    predicted."""
    pairs = list(zip(graph.placed, function.ops, strict=True))
    if any(op.verdict == ("cpu" if placed == "A" else "ane") for placed, op in pairs):
        return "wrong"
    undecided = [(placed, op.equal) for placed, op in pairs if op.verdict == "uncertain"]
    return "right" if all(pair == ("A", True) for pair in undecided) else "uncertain"


def _add(g: Graph, entry: dict[str, Any], last: str) -> str:
    dtype, shape = entry["output"]
    inputs = {key: _argument(g, value, last) for key, value in entry["inputs"].items()}
    return g._add(entry["type"], inputs, TensorType(dtype, tuple(shape)), {})


def _argument(g: Graph, value: Any, last: str) -> tuple[Argument, ...]:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return tuple(argument for item in value for argument in _argument(g, item, last))
    if not isinstance(value, dict):
        return (literal(value),)
    if "stored" in value:
        return (g.weight(tuple(value["stored"])),)
    dtype, shape = value["input"]
    kind = TensorType(dtype, tuple(shape))
    if g.types.get(last) == kind:
        return (last,)
    return (g.input(f"input_{len(g.types)}", kind.shape, dtype),)
