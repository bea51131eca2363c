"""Routing traces and groupings for the terminal."""

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ane_moe.forecast.chips import Range
from ane_moe.loop.eviction import DEFAULT_POLICY
from ane_moe.routing.function_size import SizeChoice
from ane_moe.routing.grouping import GroupingReport
from ane_moe.routing.statistics import TraceSummary

MB = 1_000_000


def trace_table(summary: TraceSummary) -> RenderableType:
    """Usage by layer, and what caches of expert functions would load."""
    head = Text(
        f"{summary.family}, {summary.source}: {summary.tokens} tokens in {summary.passages} "
        f"passages"
    )
    table = _table(
        "Routing (evenness: entropy of use, 1 is even; repeated: chosen by the token before too; "
        "in next: by the next layer too)",
        "layer",
        "experts",
        "k",
        "evenness",
        "busiest",
        "unused",
        "repeated",
        "top weight",
        "in next",
        "by chance",
    )
    overlaps = {one.layer: one for one in summary.overlaps}
    for row in summary.layers:
        overlap = overlaps.get(row.layer)
        busiest = max(range(row.experts), key=lambda expert: row.usage[expert])
        table.add_row(
            str(row.layer),
            str(row.experts),
            str(row.k),
            f"{row.entropy:.3f}",
            f"{busiest} ({row.usage[busiest]:.1%})",
            str(sum(share == 0 for share in row.usage)),
            "-" if row.repeated is None else f"{row.repeated:.1%}",
            f"{row.top_weight:.1%}",
            f"{overlap.share:.1%}" if overlap else "-",
            f"{overlap.by_chance:.1%}" if overlap else "-",
        )
    if mean := summary.mean_overlap:
        share, chance = mean
        table.caption = f"in next: {share:.1%} over all pairs of layers, {chance:.1%} by chance"
    if not summary.traffic:
        return Group(head, table)
    cached = _table(
        f"Decoding through a cache of expert functions ({DEFAULT_POLICY}; played through, not "
        "measured)",
        "cache MB",
        "of experts",
        "hits",
        "MB loaded a token",
        "MB read a token",
    )
    for one in summary.traffic:
        size = one.cache_bytes or 0
        cached.add_row(
            f"{size / MB:,.1f}",
            f"{size / summary.expert_bytes:.0%}",
            f"{one.hit_rate:.1%}",
            f"{one.bytes_loaded_per_token / MB:.2f}",
            f"{one.bytes_read_per_token / MB:.2f}",
        )
    return Group(head, table, cached)


def grouping_table(report: GroupingReport) -> RenderableType:
    """Functions a token calls, by layer, and their sums."""
    table = _table(
        f"Functions a token calls with {report.grouping.experts_per_function} experts in each, on "
        f"the "
        f"{report.tokens_left_out} tokens left out of the fit ({report.tokens_fitted})",
        "layer",
        "alone",
        "by index",
        "grouped",
        "saved",
    )
    for layer, gain in report.gains.items():
        table.add_row(
            str(layer),
            f"{gain.ungrouped:.3f}",
            f"{gain.index_order:.3f}",
            f"{gain.grouped:.3f}",
            _saved(gain.grouped, gain.index_order),
        )
    alone, index, grouped = (
        sum(getattr(gain, name) for gain in report.gains.values())
        for name in ("ungrouped", "index_order", "grouped")
    )
    table.add_row("all", f"{alone:.3f}", f"{index:.3f}", f"{grouped:.3f}", _saved(grouped, index))
    return table


def size_table(choice: SizeChoice) -> RenderableType:
    """What each number of experts per function is predicted to take; the chosen one marked."""
    table = _table(
        f"Expert calls of a token on {choice.chip}, {choice.format} weights: PREDICTED ms, low / "
        f"expected / "
        "high",
        "experts",
        "functions a token",
        "grouped",
        "by index",
    )
    best = choice.report.grouping.experts_per_function
    for cost in choice.costs:
        mark = " *" if cost.experts_per_function == best else ""
        table.add_row(
            f"{cost.experts_per_function}{mark}",
            f"{cost.functions_per_token:.3f}",
            _range(cost.ms_per_token),
            _range(cost.ms_per_token_by_index),
        )
    return Group(table, Text(f"* the least expected; {choice.note}", style="dim"))


def _saved(grouped: float, index_order: float) -> str:
    return f"{1 - grouped / index_order:+.1%}" if index_order else "-"


def _range(value: Range) -> str:
    return f"{value.low:.3g} / {value.expected:.3g} / {value.high:.3g}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table
