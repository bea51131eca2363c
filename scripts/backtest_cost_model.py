"""Hold the cost model against what people published: print the table of docs/cost-model.md, or put
it there.

    python scripts/backtest_cost_model.py [--write]

Exits with 1 when the ranges hold fewer than 70 % of the timings that nothing was fitted to.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ane_moe.forecast.backtest import Outcome, Summary, outcomes, summary  # noqa: E402

PAGE = ROOT / "docs" / "cost-model.md"
MARKED = re.compile(r"(<!-- back-test -->\n).*(<!-- end of back-test -->)", re.DOTALL)
COVERAGE = 0.7


def held_out(rows: list[Outcome]) -> list[Outcome]:
    return [row for row in rows if not row.fitted]


def sentence(what: str, found: Summary) -> str:
    return (
        f"{what}: {found.rows} rows, median error {found.median_error:.0%}, "
        f"{found.coverage:.0%} of the measurements inside their range."
    )


def table(rows: list[Outcome]) -> str:
    rest = held_out(rows)
    lines = [
        sentence("Held out", summary(rest)),
        sentence(
            "Of these, unrelated to any figure of the model",
            summary([row for row in rest if not row.series]),
        ),
        sentence(
            "Of these, published after every figure was set",
            summary([row for row in rest if row.unseen]),
        ),
        "",
        "| timing | chip | measured, ms a token | predicted: low / expected / high | error | | "
        "source | assumed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [line(row) for row in sorted(rows, key=lambda row: row.fitted)])


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
        PAGE.write_text(MARKED.sub(lambda found: f"{found[1]}{text}\n{found[2]}", PAGE.read_text()))
    else:
        print(text)
    return int(summary(held_out(rows)).coverage < COVERAGE)


if __name__ == "__main__":
    sys.exit(main())
