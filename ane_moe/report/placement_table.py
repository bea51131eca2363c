"""A PlacementReport for the terminal: a strip of the operations by engine per function, then what
keeps them off it."""

from collections.abc import Iterable, Iterator
from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ane_moe.mlprogram.printer import printable
from ane_moe.placement.result import (
    MEASURED,
    SEVERITY,
    Finding,
    FunctionPlacement,
    OpPlacement,
    PlacementReport,
    Stretch,
)

STRIP_WIDTH = 14  # the whole table fits into 80 columns
SHOWN_FINDINGS = 12
SHOWN_FUNCTIONS = 40  # beyond, functions alike in everything but the layer share a line
SHOWN_NAMES = 3
SHOWN_STRETCHES = 12
MARKS = {
    "ane": ("█", "green"),
    "cpu": ("▁", "red"),
    "gpu": ("▄", "yellow"),
    "uncertain": ("░", "bright_black"),
}
TITLES = {
    "predicted": "Placement, PREDICTED by rules for {target}, OS {os} (nothing was measured)",
    "measured": "Placement, MEASURED by Core ML on {target}, OS {os} (its plan, not a trace)",
}


def placement_report(report: PlacementReport) -> RenderableType:
    """Functions, findings (worst first, one line per rule), numerics and comparison where measured,
    the verdict."""
    title = TITLES[report.source].format(target=report.target, os=report.os)
    parts: list[RenderableType] = [Text(title, style="bold"), _functions(report), _legend()]
    parts += [*_stretches(report), *_findings(report)]
    if report.source == MEASURED:
        parts += [*_numerics(report.functions), *_comparison(report)]
    return Group(*parts, _verdict(report))


def _functions(report: PlacementReport) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("package", "function"):
        table.add_column(name, no_wrap=True, min_width=8)
    table.add_column("operations", no_wrap=True, min_width=STRIP_WIDTH, max_width=STRIP_WIDTH)
    for name in ("engine", "CPU", "GPU", "open", "cost"):
        table.add_column(
            name,
            justify="right",
            no_wrap=True,
            min_width=max(len(name), 6 if name == "cost" else 0),
        )
    table.add_column("verdict", no_wrap=True, min_width=max(map(len, MARKS)))
    for row, alike in _lines(report.functions):
        share = row.cost_share_ane
        counts = [str(row.count(verdict)) for verdict in ("ane", "cpu", "gpu", "uncertain")]
        path = printable(row.path.removesuffix(".mlpackage")) + (
            f" and {alike} alike" if alike else ""
        )
        table.add_row(
            path,
            printable(row.function),
            _strip(row.ops),
            *counts,
            "-" if share is None else f"{share:.1%}",
            row.verdict,
        )
    return table


def _stretches(report: PlacementReport) -> Iterator[Table]:
    """What decides whether a legal stretch of operations goes to the engine."""
    lines = _lines(report.functions)
    rows = [(row, stretch, alike) for row, alike in lines for stretch in row.stretches]
    if not rows:
        return
    table = Table(
        title="Core ML's estimates, and what a run saves beyond its price, ms",
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for name in ("package", "function", "from"):
        table.add_column(name, no_wrap=True, max_width=24)
    measured = ("predicted",) if report.source == MEASURED else ()
    for name in ("ops", "engine", "CPU", "margin", *measured):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    shown = sorted(rows, key=lambda row: row[1].margin_ms)[:SHOWN_STRETCHES]
    for row, stretch, alike in shown:
        path = printable(row.path.removesuffix(".mlpackage"))
        table.add_row(
            path + (f" and {alike} alike" if alike else ""),
            printable(row.function),
            printable(stretch.first),
            str(stretch.ops),
            f"{stretch.ane_ms:.3g}",
            f"{stretch.cpu_ms:.3g}",
            stretch.margin,
            *(_expected(row, stretch) for _ in measured),
            stretch.verdict,
        )
    if len(rows) > len(shown):
        table.caption = f"the {len(shown)} of {len(rows)} with the least margin (--json has all)"
    yield table


def _expected(row: FunctionPlacement, stretch: Stretch) -> str:
    """The margin that was predicted for a stretch."""
    alike = (other.margin for other in row.expected if other.first == stretch.first)
    return next(alike, "-")


def _lines(functions: tuple[FunctionPlacement, ...]) -> list[tuple[FunctionPlacement, int]]:
    """What to show: a function, and how many more are like it."""
    if len(functions) <= SHOWN_FUNCTIONS:
        return [(row, 0) for row in functions]
    groups: dict[object, list[FunctionPlacement]] = {}
    for row in functions:
        kind = row.path.partition("/")[0]
        ops = tuple((op.op_type, op.verdict) for op in row.ops)
        groups.setdefault((kind, row.function, ops, row.cost_share_ane), []).append(row)
    return [(group[0], len(group) - 1) for group in groups.values()]


def _strip(ops: tuple[OpPlacement, ...]) -> Text:
    """At most STRIP_WIDTH cells; a cell shows the worst engine among its operations."""
    width = min(STRIP_WIDTH, len(ops))
    cells = [
        ops[len(ops) * cell // width : len(ops) * (cell + 1) // width] for cell in range(width)
    ]
    worst = [min((op.verdict for op in cell), key=SEVERITY.__getitem__) for cell in cells]
    return Text.assemble(
        *(
            (MARKS[verdict][0] * len(list(run)), MARKS[verdict][1])
            for verdict, run in groupby(worst)
        )
    )


def _legend() -> Text:
    words = {"ane": "Neural Engine", "cpu": "CPU", "gpu": "GPU", "uncertain": "open"}
    return Text.assemble(
        *((f"{MARKS[key][0]} {word}   ", MARKS[key][1]) for key, word in words.items())
    )


def _findings(report: PlacementReport) -> Iterator[Text]:
    groups: dict[tuple[str, str], list[tuple[FunctionPlacement, Finding]]] = {}
    for function in report.functions:
        for finding in function.findings:
            groups.setdefault((finding.rule, finding.verdict), []).append((function, finding))
    ordered = sorted(groups.values(), key=_severity)
    for group in ordered[:SHOWN_FINDINGS]:
        yield _finding(group)
    if len(ordered) > SHOWN_FINDINGS:
        yield Text(
            f"and {len(ordered) - SHOWN_FINDINGS} more kinds of findings (--json lists them all)"
        )


def _severity(group: list[tuple[FunctionPlacement, Finding]]) -> tuple[bool, int, int]:
    broken = any(finding in function.broken for function, finding in group)
    return (not broken, SEVERITY[group[0][1].verdict], -len(group))


def _finding(group: list[tuple[FunctionPlacement, Finding]]) -> Text:
    _, first = group[0]
    functions = {(function.path, function.function) for function, _ in group}
    names = list(dict.fromkeys(finding.op for _, finding in group if finding.op))
    shown = ", ".join(map(printable, names[:SHOWN_NAMES])) + (
        ", ..." if len(names) > SHOWN_NAMES else ""
    )
    kinds = ", ".join(
        sorted({printable(finding.op_type or "whole function") for _, finding in group})
    )
    where = (
        f"{kinds} x {len(group)} in {len(functions)} function{'s' if len(functions) > 1 else ''}"
    )
    text = Text.assemble(
        (f"{first.verdict}  ", MARKS[first.verdict][1]),
        (f"{first.rule}", "bold"),
        f"  {where}{': ' + shown if shown else ''}\n     {printable(first.reason)}",
    )
    if first.against:
        text.append(f"\n     against it: {first.against}")
    text.append(f"\n     source: {first.source} ({first.confidence})")
    if first.remedy:
        text.append(f"\n     remedy: {first.remedy}")
    return text


def _numerics(functions: Iterable[FunctionPlacement]) -> Iterator[Table]:
    rows = [(row, name, figures) for row in functions for name, figures in row.numerics.items()]
    if not rows:
        return
    table = Table(
        title="The same package on CPU only and on CPU and engine, random inputs",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for column in ("package", "function", "output", "relative L2", "max error"):
        table.add_column(column)
    for row, name, figures in rows:
        table.add_row(
            printable(row.path).removesuffix(".mlpackage"),
            printable(row.function),
            printable(name),
            f"{figures['relative_l2']:.2e}",
            f"{figures['max_abs_error']:.2e}",
        )
    yield table


def _comparison(report: PlacementReport) -> Iterator[Table]:
    if not report.comparison:
        return
    table = Table(
        title="Predictions against this measurement, operations by rule",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    columns = {
        "right": "right",
        "wrong": "wrong",
        "undecided_ane": "undecided: on",
        "undecided_off": "off",
    }
    table.add_column("rule")
    for title in columns.values():
        table.add_column(title, justify="right")
    for rule, counts in sorted(report.comparison.items(), key=lambda item: -item[1]["wrong"]):
        table.add_row(rule, *(str(counts[column]) for column in columns))
    yield table


def _verdict(report: PlacementReport) -> Text:
    broken = sum(len(function.broken) for function in report.functions)
    if report.source == MEASURED:
        words = "every gate passed" if report.passed else f"{broken} findings against the gates"
        return Text(
            f"{'passed' if report.passed else 'FAILED'}  measured: {words}",
            style="green" if report.passed else "bold red",
        )
    if broken:
        return Text(
            f"FAILED  predicted: {broken} findings from documented or measured rules",
            style="bold red",
        )
    if not report.passed:
        return Text(
            "FAILED  no rule is broken, but a measurement is required and there is none: run "
            "this on a Mac",
            style="bold red",
        )
    return Text(
        "no rule broken  (a prediction: whether it runs on the engine shows on a Mac only)",
        style="green",
    )
