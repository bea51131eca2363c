"""How large the golden's hidden states get, for the terminal, beside what fp16 and the engine
hold."""

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ane_moe.original.ranges import STREAM_LIMIT, SUM_LIMIT
from ane_moe.verification.result import VerifyReport

SHOWN_LAYERS = 3


def range_tables(report: VerifyReport) -> Iterator[RenderableType]:
    """The layers that come nearest to a limit, and what to divide by where one is too near."""
    rows = sorted(report.ranges, key=lambda one: -one.share)[:SHOWN_LAYERS]
    divided = "" if report.stream_scale == 1 else f", divided by {1 / report.stream_scale:.0f}"
    table = Table(
        title=f"Largest magnitudes of the golden{divided}: hidden states, and partial sums that "
        f"are added to them: the {len(rows)} nearest of {len(report.ranges)} layers",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 0),
    )
    limits = (f"of {STREAM_LIMIT:,.0f}", f"of {SUM_LIMIT:,.0f}")
    for name in ("layer", "hidden states", limits[0], "sums", limits[1]):
        table.add_column(name, justify="left" if name == "layer" else "right")
    for row in sorted(rows, key=lambda one: one.layer):
        table.add_row(
            str(row.layer),
            f"{row.stream:,.5g}",
            f"{row.stream / STREAM_LIMIT:.1%}",
            f"{row.sums:,.5g}" if row.sums else "-",
            f"{row.sums / SUM_LIMIT:.1%}" if row.sums else "-",
            style="red" if row.share > 1 else None,
        )
    yield table
    if report.stream_divisor * report.stream_scale > 1:
        yield Text(
            f"hidden states come near the end of fp16 or of the engine's sums: convert again with "
            f"--stream-scale {report.stream_divisor}",
            style="yellow",
        )
