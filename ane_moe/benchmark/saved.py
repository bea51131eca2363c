"""Reports on disk, and one held against an earlier one."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ane_moe.benchmark.result import FORMAT, BenchReport
from ane_moe.errors import UserError
from ane_moe.files import write_named_by_user

MAX_BYTES = 16_000_000
# Conditions that are told when they differ.
CONDITIONS = (
    "chip",
    "os",
    "units",
    "power_source",
    "low_power_mode",
    "weights",
    "adapter",
    "routing",
    "context",
    "prefill_tokens",
    "versions",
)


@dataclass(frozen=True)
class Change:
    """One figure then and now. `ratio` is of speeds: above 1, it is faster now."""

    what: str
    unit: str
    before: float
    now: float
    ratio: float


@dataclass(frozen=True)
class Comparison:
    """Figures that both reports have, and the conditions that are not the same."""

    against: str
    differing: dict[str, tuple[Any, Any]]
    changes: tuple[Change, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def save_report(report: BenchReport, path: Path) -> None:
    """Write the report's JSON document, atomically. Raises UserError when the file cannot be
    written."""
    write_named_by_user(path, json.dumps(report.as_json(), indent=1) + "\n")


def read_saved(path: Path) -> dict[str, Any]:
    """A document that `save_report` wrote. Raises UserError when it is none, or one of wrong
    output."""
    again = "save one with `ane-moe bench OUT --save FILE`"
    try:
        size = path.stat().st_size
        document = json.loads(path.read_text()) if size <= MAX_BYTES else None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read", str(error), again) from None
    if (
        not isinstance(document, dict)
        or document.get("format") != FORMAT
        or "functions" not in document
    ):
        raise UserError(f"{path} is no saved bench report", "another format", again)
    if not document.get("passed"):
        raise UserError(f"{path} holds no speed", "its output was wrong", again)
    return document


def compare(report: BenchReport, earlier: dict[str, Any], name: str) -> Comparison:
    """`report` against a saved document. Raises UserError when the runtimes differ: their times
    have nothing in common, and when the document lacks fields."""
    now = json.loads(json.dumps(report.as_json()))
    if earlier.get("runtime") != now["runtime"]:
        raise UserError(
            "the two runs are of different runtimes",
            f"{earlier.get('runtime')} then, {now['runtime']} now",
            "compare runs of the same runtime",
        )
    try:
        figures_then, figures_now = dict(_figures(earlier)), dict(_figures(now))
        then = {"adapter": None} | earlier["conditions"]  # saved before there were adapters
        differing = {
            key: (then[key], now["conditions"][key])
            for key in CONDITIONS
            if then[key] != now["conditions"][key]
        }
        changes = tuple(
            _change(key, figures_then[key], value)
            for key, value in figures_now.items()
            if key in figures_then
        )
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(
            f"{name} is not a whole bench report", f"{type(error).__name__}: {error}"
        ) from None
    return Comparison(name, differing, changes)


def _figures(document: dict[str, Any]) -> Iterator[tuple[tuple[str, str], float]]:
    """(what, unit) -> value of every figure worth comparing."""
    for row in document["functions"]:
        yield (
            (f"{row['kind']} {row['function']} (T={row['tokens']})", "ms"),
            float(row["latency"]["median_ms"]),
        )
    for row in document["decode"]:
        yield (f"decode after {row['fill']} tokens", "tok/s"), float(row["tok_s"])
    for row in document["prefill"]:
        yield (f"prefill of {row['tokens']} tokens", "tok/s"), float(row["tok_s"])
    for row in document.get("windows", []):
        yield (f"window of {row['tokens']} tokens", "tok/s"), float(row["tok_s"])
    yield ("loading", "s"), float(document["load"]["seconds"])


def _change(key: tuple[str, str], before: float, now: float) -> Change:
    what, unit = key
    return Change(what, unit, before, now, now / before if unit == "tok/s" else before / now)
