"""Predictions held against a measurement, and the small file a person can send so that the rules
get better."""

import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ane_moe.files import write_text
from ane_moe.mlprogram.reader import read_program
from ane_moe.placement.facts import function_facts
from ane_moe.placement.result import FunctionPlacement, OpPlacement, PlacementReport

FILE_NAME = "placement-feedback.json"
FORMAT = 2
# The facts that the rows of estimates.toml read.
ESTIMATED_BY = (
    "flops",
    "reduction",
    "channels_out",
    "dilation",
    "window",
    "rank",
    "dtypes",
    "arg_perm",
    "elements_first",
    "elements_in",
    "elements_out",
    "elements_literal",
    "bytes_first",
    "bytes_in",
    "bytes_out",
    "bytes_literal",
)
COLUMNS = ("right", "wrong", "undecided_ane", "undecided_off")


def compare(predicted: PlacementReport, measured: PlacementReport) -> dict[str, dict[str, int]]:
    """By rule: operations where its verdict was right and wrong, and where it was undecided, what
    came of it."""
    counts: dict[str, dict[str, int]] = {}
    for guess, fact in _pairs(predicted, measured):
        found = {op.op: op.verdict for op in fact.ops}
        for op in guess.ops:
            column = _column(op, found.get(op.op))
            for rule in op.rules if column else ():
                counts.setdefault(rule, dict.fromkeys(COLUMNS, 0))[str(column)] += 1
    return counts


def feedback(
    predicted: PlacementReport,
    measured: PlacementReport,
    packages: Iterable[tuple[Path, str]] = (),
) -> dict[str, Any]:
    """Sizes, devices, rules and Core ML's own estimates where they were read, no names or paths of
    files; `comparison` of `measured` has to be there. `packages` are (path, name in the report).
    """
    return {
        "format": FORMAT,
        "chip": measured.target,
        "os": measured.os,
        "coremltools": version("coremltools"),
        "rules": measured.comparison,
        "functions": [_function(guess, fact) for guess, fact in _pairs(predicted, measured)],
        "estimates": _estimates(measured, dict((name, path) for path, name in packages)),
    }


def _estimates(measured: PlacementReport, paths: dict[str, Path]) -> list[dict[str, Any]]:
    """Each distinct operation whose estimates were read, with the facts that estimates go by."""
    found: dict[str, dict[str, Any]] = {}
    for row in measured.functions:
        if not row.segments or row.path not in paths:
            continue
        ops = function_facts(read_program(paths[row.path]), row.function).ops
        facts = {op.name: op.facts for op in ops}
        for segment in row.segments:
            known = facts.get(segment.name)
            if known and known["op"] == segment.type:
                kept = {name: _plain(known[name]) for name in ESTIMATED_BY if name in known}
                entry = {"op": segment.type, "facts": kept, "ms": segment.ms}
                found.setdefault(json.dumps(entry), entry)
    return list(found.values())


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, frozenset) else value


def write_feedback(document: dict[str, Any], folder: Path) -> Path:
    """Write FILE_NAME into `folder`, atomically."""
    path = folder / FILE_NAME
    write_text(path, json.dumps(document, indent=1) + "\n")
    return path


def _pairs(
    predicted: PlacementReport, measured: PlacementReport
) -> list[tuple[FunctionPlacement, FunctionPlacement]]:
    guesses = {(row.path, row.function): row for row in predicted.functions}
    return [
        (guesses[row.path, row.function], row)
        for row in measured.functions
        if row.ops and (row.path, row.function) in guesses
    ]


def _column(op: OpPlacement, device: str | None) -> str | None:
    if device in (None, "uncertain"):
        return None
    on_engine = device == "ane"
    if op.verdict == "uncertain":
        return "undecided_ane" if on_engine else "undecided_off"
    return "right" if on_engine == (op.verdict == "ane") else "wrong"


def _function(guess: FunctionPlacement, fact: FunctionPlacement) -> dict[str, Any]:
    """`margins_ms` are predicted, of every stretch that the engine may run."""
    return {
        "weight_bytes": guess.weight_bytes,
        "flops": guess.flops,
        "ops": len(guess.ops),
        "predicted": guess.verdict,
        "margins_ms": [stretch.margin_ms for stretch in guess.stretches],
        "ops_ane": fact.count("ane"),
        "ops_cpu": fact.count("cpu"),
        "ops_gpu": fact.count("gpu"),
        "cost_share_ane": fact.cost_share_ane,
    }
