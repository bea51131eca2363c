"""Predictions held against a measurement, and the small file a person can send so that the rules
get better."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ane_moe.files import write_text
from ane_moe.placement.result import FunctionPlacement, OpPlacement, PlacementReport

FILE_NAME = "placement-feedback.json"
FORMAT = 1
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


def feedback(predicted: PlacementReport, measured: PlacementReport) -> dict[str, Any]:
    """Sizes, devices and rules, no names or paths of files; `comparison` of `measured` has to be
    there."""
    return {
        "format": FORMAT,
        "chip": measured.target,
        "os": measured.os,
        "coremltools": version("coremltools"),
        "rules": measured.comparison,
        "functions": [_function(guess, fact) for guess, fact in _pairs(predicted, measured)],
    }


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
    """`legal`: no rule but the cost decision had a say, so that the function tells about the
    thresholds."""
    rules = {rule for op in guess.ops for rule in op.rules if op.verdict != "ane"}
    return {
        "weight_bytes": guess.weight_bytes,
        "flops": guess.flops,
        "reduction": guess.reduction,
        "ops": len(guess.ops),
        "legal": all(rule.startswith("cost-") for rule in rules),
        "predicted": guess.verdict,
        "ops_ane": fact.count("ane"),
        "ops_cpu": fact.count("cpu"),
        "ops_gpu": fact.count("gpu"),
        "cost_share_ane": fact.cost_share_ane,
    }
