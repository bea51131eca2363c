"""What an `.aimodel` holds, for the terminal."""

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ane_moe.mlprogram.printer import printable
from ane_moe.runtime.coreai.summary import AssetFunction, AssetSummary

SHOWN = 20  # functions; those of experts are alike


def asset_report(summary: AssetSummary) -> RenderableType:
    """Facts, functions, how constants are stored, and operations."""
    facts = [
        ("package", summary.path),
        ("program", f"{summary.program_bytes:,} bytes, weights included"),
        ("functions", str(len(summary.functions))),
    ]
    parts = [_table("", facts)]
    parts += [part for one in summary.functions[:SHOWN] for part in _function(one)]
    if len(summary.functions) > SHOWN:
        parts.append(Text(f"and {len(summary.functions) - SHOWN} more functions"))
    elements = [(name, f"{count:,}") for name, count in summary.elements.items()]
    counts = [(name, f"{count:,}") for name, count in summary.operations.items()]
    parts.append(_table("elements of constants by type", elements))
    return Group(*parts, _table("operations", counts))


def _function(function: AssetFunction) -> Iterable[RenderableType]:
    roles = (
        ("input", function.inputs),
        ("state", function.states),
        ("output", function.outputs),
    )
    rows = [(f"{role} {name}", kind) for role, named in roles for name, kind in named]
    yield _table(f"function {function.name}", rows)


def _table(title: str, rows: Sequence[tuple[str, str]]) -> RenderableType:
    table = Table(show_header=False, box=None, pad_edge=False)
    for _ in range(2):
        table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return Group("", Text(printable(title), style="bold"), table) if title else Group("", table)
