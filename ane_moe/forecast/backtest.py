"""The cost model held against published timings (`measurements.toml`)."""

import statistics
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ane_moe.forecast.chips import Range, find_chip
from ane_moe.forecast.cost_model import breakdown
from ane_moe.forecast.workload import Calls
from ane_moe.formats.recipe import find_format

CORE_ML = "Core ML"
MEASUREMENTS = Path(__file__).with_name("measurements.toml")


@dataclass(frozen=True)
class Outcome:
    """One published timing beside its prediction, in ms a token. `fitted`: a figure of the model
    was read off it, so its agreement proves nothing. `series`: rows of one experiment of which
    others are fitted, or whose source set an end of a range. `runtime`: whose speed was measured;
    the model's is Core ML's."""

    name: str
    chip: str
    source: str
    assumed: str
    runtime: str
    fitted: bool
    series: str
    unseen: bool
    measured_ms: tuple[float, float]
    predicted_ms: Range

    @property
    def middle(self) -> float:
        return sum(self.measured_ms) / 2

    @property
    def error(self) -> float:
        """Expected over measured, less 1."""
        return self.predicted_ms.expected / self.middle - 1

    @property
    def inside(self) -> bool:
        """Whether the middle of what was measured lies in the predicted range."""
        return self.predicted_ms.contains(self.middle)


@dataclass(frozen=True)
class Summary:
    """Of the outcomes it is made of: their number, the median of |error|, and the share inside
    their range."""

    rows: int
    median_error: float
    coverage: float


def outcomes() -> list[Outcome]:
    """Every published timing with its prediction."""
    return [_outcome(row) for row in tomllib.loads(MEASUREMENTS.read_text())["row"]]


def summary(rows: list[Outcome]) -> Summary:
    error = statistics.median(abs(row.error) for row in rows)
    return Summary(len(rows), error, sum(row.inside for row in rows) / len(rows))


def _outcome(row: dict[str, Any]) -> Outcome:
    chip, steps = find_chip(row["chip"]), row.get("steps", 1)
    calls = tuple(_calls(entry) for entry in row["calls"])
    loop, loaded, host = (
        row.get("loop", "tight"),
        row.get("loaded_gb", 0) * 1e9,
        row.get("host", True),
    )
    predicted = breakdown(calls, chip, loop=loop, steps=steps, loaded_bytes=loaded, host=host)
    measured = row["ms"] if "ms" in row else [1e3 / value for value in reversed(row["tok_s"])]
    return Outcome(
        row["name"],
        row["chip"],
        row["source"],
        row.get("assumed", ""),
        row.get("runtime", CORE_ML),
        row.get("fitted", False),
        row.get("series", ""),
        row.get("unseen", False),
        (measured[0], measured[1]),
        predicted.per_token_ms,
    )


def _calls(entry: dict[str, Any]) -> Calls:
    form, weights = find_format(entry["format"]), round(entry["mweights"] * 1e6)
    stored = round(entry.get("stored_mb", weights * form.bits_per_weight / 8e6) * 1e6)
    count = Range(entry["count"], entry["count"], entry["count"])
    cache = round(entry.get("cache_mb", 0) * 1e6)
    tokens = entry.get("tokens", 1)
    return Calls(entry["kind"], count, stored, weights, form.rate, tokens, cache)
