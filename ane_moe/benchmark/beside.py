"""What the cost model predicted, beside what was measured on the chip it predicts for."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ane_moe.benchmark.result import BenchReport
from ane_moe.forecast.chips import Range, chip_names, find_chip
from ane_moe.forecast.cost_model import NOTE, Loop, Prediction, predict
from ane_moe.forecast.workload import workload_of

# coremltools' binding takes dictionaries of fp32 arrays and allocates the outputs of every call
# (runtime/coreml/runtime.py).
LOOP: Loop = "naive"
ON_ENGINE = ("cpu_and_ne", "all")


@dataclass(frozen=True)
class Row:
    """One figure: `predicted` is low, expected and high; `ratio` is measured over expected."""

    what: str
    unit: str
    measured: float
    predicted: Range

    @property
    def ratio(self) -> float:
        return self.measured / self.predicted.expected

    @property
    def within(self) -> bool:
        return self.predicted.contains(self.measured)


@dataclass(frozen=True)
class Beside:
    """A prediction for `chip` and the measurements it can be held against."""

    chip: str
    loop: str
    rows: tuple[Row, ...]
    note: str = NOTE

    def as_json(self) -> dict[str, Any]:
        """Plain JSON data; predictions as low, expected, high."""
        rows = [asdict(row) | {"ratio": row.ratio, "within": row.within} for row in self.rows]
        return {"chip": self.chip, "loop": self.loop, "note": self.note, "rows": rows}


def set_beside(report: BenchReport, folder: Path, concurrency: int = 1) -> Beside | str:
    """The prediction for the chip that `report` was measured on; or why there is none."""
    chip, units = report.conditions.chip, report.conditions.units
    if not report.is_device:
        return f"the {report.runtime} runtime was timed: there is nothing to compare with a chip"
    if units not in ON_ENGINE:
        return f"predictions are for the Neural Engine, and the units were {units}"
    if chip not in chip_names():
        return f"the cost model has no figures for {chip}"
    workload = workload_of(folder, report.conditions.adapter)
    predicted = predict(workload, find_chip(chip), loop=LOOP, concurrency=concurrency)
    return Beside(chip, LOOP, tuple(_rows(report, predicted)))


def _rows(report: BenchReport, prediction: Prediction) -> list[Row]:
    """Decoding after every fill, prefill of whole calls, and loading once everything is
    compiled."""
    rows = [
        Row(
            f"decode after {row.fill} tokens",
            "ms a token",
            row.latency.median_ms,
            prediction.decode.per_token_ms,
        )
        for row in report.decode
    ]
    call = report.conditions.prefill_tokens or 1
    rows += [
        Row(
            f"prefill of {row.tokens} tokens",
            "ms a token",
            row.latency.median_ms / row.tokens,
            prediction.prefill.per_token_ms,
        )
        for row in report.prefill
        if row.tokens % call == 0
    ]
    if report.load and report.conditions.all_compiled:
        rows.append(Row("loading", "s", report.load.seconds, prediction.load_seconds))
    return rows
