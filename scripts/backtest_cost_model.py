"""Hold the cost model against what people published, and against the model before it: print the
tables of docs/cost-model.md, or put them there.

    python scripts/backtest_cost_model.py [--write]

Exits with 1 when the ranges hold fewer than 80 % of the timings that nothing was fitted to.
"""

import sys
import tomllib
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ane_moe.forecast.backtest import CORE_ML, Outcome, outcomes, summary  # noqa: E402
from ane_moe.forecast.chips import Range  # noqa: E402
from scripts.doc_page import PagePart  # noqa: E402

EARLIER = ROOT / "scripts" / "earlier_predictions.toml"
TABLE = PagePart("cost-model.md", "back-test")
COVERAGE = 0.8


def before(rows: list[Outcome]) -> list[Outcome]:
    """The same timings beside what the earlier model predicted for them."""
    earlier = tomllib.loads(EARLIER.read_text())["row"]
    known = {(row["name"], row["chip"]): Range(*row["ms"]) for row in earlier}
    return [replace(row, predicted_ms=known[row.name, row.chip]) for row in rows]


def held_out(rows: list[Outcome]) -> list[Outcome]:
    return [row for row in rows if not row.fitted and row.runtime == CORE_ML]


def unrelated(rows: list[Outcome]) -> list[Outcome]:
    return [row for row in held_out(rows) if not row.series]


def unseen(rows: list[Outcome]) -> list[Outcome]:
    return [row for row in rows if row.unseen]


def sentence(what: str, rows: list[Outcome]) -> str:
    then, now = summary(before(rows)), summary(rows)
    return (
        f"| {what} | {now.rows} | {then.median_error:.0%} | {now.median_error:.0%} | "
        f"{then.coverage:.0%} | {now.coverage:.0%} |"
    )


def table(rows: list[Outcome]) -> str:
    lines = [
        "| rows | number | median error before | after | inside their range before | after |",
        "|---|---|---|---|---|---|",
        sentence("held out", held_out(rows)),
        sentence("of these, unrelated to any figure of the model", unrelated(rows)),
        sentence("of these, of experiments that gave neither model a figure", unseen(rows)),
        "",
        *timings([row for row in rows if row.runtime == CORE_ML]),
        "",
        "By Core AI on the Neural Engine, beside what is predicted of Core ML there; not counted:",
        "",
        *timings([row for row in rows if row.runtime != CORE_ML]),
    ]
    return "\n".join(lines)


def timings(rows: list[Outcome]) -> list[str]:
    return [
        "| timing | chip | measured, ms a token | predicted: low / expected / high | error | | "
        "source | assumed |",
        "|---|---|---|---|---|---|---|---|",
        *(line(row) for row in sorted(rows, key=lambda row: row.fitted)),
    ]


def line(row: Outcome) -> str:
    low, high = (f"{value:.3g}" for value in row.measured_ms)
    measured = low if low == high else f"{low} to {high}"
    ends = (row.predicted_ms.low, row.predicted_ms.expected, row.predicted_ms.high)
    predicted = " / ".join(f"{value:.3g}" for value in ends)
    state = "fitted" if row.fitted else "inside" if row.inside else "**outside**"
    cells = (
        row.name,
        row.chip,
        measured,
        predicted,
        f"{row.error:+.0%}",
        state,
        row.source,
        row.assumed,
    )
    return f"| {' | '.join(cells)} |"


def main() -> int:
    rows = outcomes()
    text = table(rows)
    if "--write" in sys.argv[1:]:
        TABLE.write(text)
    else:
        print(text)
    return int(summary(held_out(rows)).coverage < COVERAGE)


if __name__ == "__main__":
    sys.exit(main())
