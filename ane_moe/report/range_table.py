"""How large the golden's hidden states get, for the terminal, beside what fp16 and the engine
hold."""

from collections.abc import Iterator
from dataclasses import astuple

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ane_moe.original.ranges import STREAM_LIMIT, SUM_LIMIT, LayerRange, needed_inner
from ane_moe.verification.result import VerifyReport
from ane_moe.wording import counted, listed

SHOWN_LAYERS = 3
# Of the numbers of a LayerRange, in their order.
LIMITS = {
    "hidden states": STREAM_LIMIT,
    "sums": SUM_LIMIT,
    "values": SUM_LIMIT,
    "up": SUM_LIMIT,
    "into down": STREAM_LIMIT,
}


def range_tables(report: VerifyReport) -> Iterator[RenderableType]:
    """The layers that come nearest to a limit, and what to divide by where one is too near."""
    rows = sorted(report.ranges, key=lambda one: -_nearest(one))[:SHOWN_LAYERS]
    divided = "" if report.stream_scale == 1 else f", divided by {1 / report.stream_scale:.0f}"
    table = Table(
        title=f"Largest magnitudes of the golden: hidden states{divided} and partial sums that are "
        f"added to them, those of attention's values, and in MLPs of up, and of what enters down: "
        f"the {len(rows)} nearest of {len(report.ranges)} layers",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 0),
    )
    table.add_column("layer")
    for name, limit in LIMITS.items():
        table.add_column(f"{name}\nof {limit:,.0f}", justify="right")
    for row in sorted(rows, key=lambda one: one.layer):
        table.add_row(
            str(row.layer),
            *map(_cell, astuple(row)[1:], LIMITS.values()),
            style="red" if _nearest(row) > 1 else None,
        )
    yield table
    if report.stream_divisor * report.stream_scale > 1:
        yield Text(
            f"hidden states come near the end of fp16 or of the engine's sums: convert again with "
            f"--stream-scale {report.stream_divisor}",
            style="yellow",
        )
    if close := needed_inner(report.ranges):
        yield Text(
            f"inside of {counted(len(close), 'layer')} ({listed(map(str, close))}) numbers come "
            "near a limit: convert again with --golden and --stream-scale auto, which divides them "
            "where no activation clamps them",
            style="yellow",
        )


def _nearest(row: LayerRange) -> float:
    return max(row.share, row.inner_share)


def _cell(largest: float, limit: float) -> str:
    return f"{largest:,.5g} ({largest / limit:.0%})" if largest else "-"
