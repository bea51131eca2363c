"""An AgainstReport for the terminal: the worst of each kind of value, every failure by name."""

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ane_moe.report.failure_lines import failure_lines
from ane_moe.report.verify_table import functions_table
from ane_moe.verification.pairs import AgainstReport, PairResult

COLUMNS = ("kind", "function", "value", "passed", "rel. L2", "beyond rounding", "cosine", "error")


def against_report(report: AgainstReport) -> RenderableType:
    """The table of pairs, that against the golden, failures, and the verdict last."""
    parts: list[RenderableType] = [_pairs(report)]
    if report.golden:
        title = f"Functions by {report.runtime}, against the original model"
        parts.append(functions_table(report.golden, title))
    return Group(*parts, *_failures(report), _verdict(report))


def _pairs(report: AgainstReport) -> Table:
    title = (
        f"reference against {report.runtime} on {report.inputs} inputs: the worst of each kind; "
        f"tolerance {report.tolerance:g}"
    )
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0))
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if number < 3 else "right")
    for (kind, function, value), rows in _by_kind(report.pairs).items():
        worst = max(rows, key=lambda row: (not row.passed, row.beyond))
        passed = sum(row.passed for row in rows)
        table.add_row(
            kind,
            function,
            value,
            f"{passed}/{len(rows)}",
            f"{worst.relative_l2:.2e}",
            f"{worst.beyond:.2e}",
            f"{worst.cosine:.6f}",
            f"{worst.max_abs_error:.2e}",
            style=None if passed == len(rows) else "red",
        )
    return table


def _by_kind(rows: Iterable[PairResult]) -> dict[tuple[str, str, str], list[PairResult]]:
    groups: dict[tuple[str, str, str], list[PairResult]] = {}
    for row in rows:
        groups.setdefault((row.kind, row.function, row.value), []).append(row)
    return groups


def _failures(report: AgainstReport) -> Iterable[Text]:
    lines = [f"{part.path}: not compared: {part.why}" for part in report.left_out]
    lines += [f"{r.path} {r.function} {r.value}: {r.reason}" for r in report.pairs if not r.passed]
    lines += [
        f"{row.path} {row.function}, {report.runtime} against the original: {row.reason}"
        for row in report.golden
        if not row.passed
    ]
    yield from failure_lines(lines)


def _verdict(report: AgainstReport) -> Text:
    what = (
        f"{report.folder}: {report.parts} distinct parts of {report.shards} packages, "
        f"reference against {report.runtime} (placement is not looked at)"
    )
    if report.passed:
        return Text(f"passed {what}", style="green")
    return Text(f"FAILED  {what}", style="bold red")
