"""What the engine's arithmetic costs, for the terminal: always said to be predicted."""

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ane_moe.verification.engine_result import EngineOperation, EngineReport

SHOWN_LAYERS = 8
SHOWN_OPERATIONS = 8


def engine_title(report: EngineReport) -> Text:
    """Says of everything below it that it is no measurement."""
    systems = ", ".join(f"macOS {number}" for number in report.systems)
    chips = ", ".join(chip.upper() for chip in report.chips)
    return Text(
        f"Predicted, not measured: by the arithmetic published for {chips} ({systems}), computed "
        "here for every operation, wherever it may be placed",
        style="bold",
    )


def engine_tables(report: EngineReport) -> Iterator[RenderableType]:
    """Routing and the whole model beside exact sums, then the operations nearest to overflow."""
    if report.routing:
        yield _routing(report)
    if report.models:
        yield _models(report)
    yield _operations(report)
    yield Text(f"products dropped for their size: {report.dropped_share:.2%} of those not zero")


def _routing(report: EngineReport) -> Table:
    rows = sorted(report.routing, key=lambda row: row.engine_agreement)[:SHOWN_LAYERS]
    table = _table(
        "Predicted routing, tokens with the model's experts: the "
        f"{len(rows)} worst of {len(report.routing)} layers",
        ("layer", "tokens", "exact sums", "near ties", "engine", "near ties"),
    )
    for row in sorted(rows, key=lambda row: row.layer):
        table.add_row(
            str(row.layer),
            str(row.tokens),
            f"{row.exact_agreement:.2%}",
            str(row.exact_near_tie_flips),
            f"{row.engine_agreement:.2%}",
            str(row.engine_near_tie_flips),
        )
    return table


def _models(report: EngineReport) -> Table:
    table = _table(
        "Predicted cost for the whole model, exact sums / engine (KL in nats against the golden)",
        ("function", "tokens", "golden", "perplexity", "mean KL", "top-1"),
    )
    for row in report.models:
        table.add_row(
            row.function,
            str(row.tokens),
            _plain(row.perplexity_golden),
            f"{_plain(row.perplexity_exact)} / {_plain(row.perplexity_engine)}",
            f"{row.mean_kl_exact:.2e} / {row.mean_kl_engine:.2e}",
            f"{row.top1_exact:.2%} / {row.top1_engine:.2%}",
        )
    return table


def _operations(report: EngineReport) -> Table:
    sums = [row for row in report.operations if row.terms or row.overflows]
    rows = sorted(sums, key=_nearness, reverse=True)[:SHOWN_OPERATIONS]
    table = _table(
        f"Predicted sums of products against their limit: the {len(rows)} nearest of {len(sums)}",
        (
            "operation",
            "terms",
            "largest met",
            "possible",
            "limit",
            "overflows",
            "on the way",
            "in some order",
            "dropped",
        ),
    )
    for row in rows:
        table.add_row(
            f"{row.path} {row.function} {row.name}",
            str(row.terms or "-"),
            f"{_largest(row):.5g}",
            f"{row.largest_possible:.5g}" if row.terms else "-",
            f"{row.limit:.0f}",
            str(row.overflows),
            str(row.on_the_way) if row.terms else "-",
            str(row.at_risk) if row.terms else "-",
            f"{row.dropped_share:.2%}" if row.terms else "-",
            style="red" if row.overflows else None,
        )
    return table


def _largest(row: EngineOperation) -> float:
    return row.largest_partial if row.terms else row.largest_result


def _nearness(row: EngineOperation) -> tuple[bool, float]:
    return bool(row.overflows), _largest(row) / row.limit


def overflow_lines(report: EngineReport) -> list[str]:
    """A line for each operation that overflows."""
    return [_overflow_line(row) for row in report.overflowing]


def _overflow_line(row: EngineOperation) -> str:
    line = (
        f"{row.path} {row.function} {row.name} ({row.op}): {row.overflows} of {row.results} results"
        f" are predicted to overflow at {row.limit:.0f}"
    )
    if not row.terms:
        return line
    return (
        f"{line}, {row.on_the_way} on the way to a smaller sum; weights divided by "
        f"{row.harmless_divisor} would not"
    )


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
