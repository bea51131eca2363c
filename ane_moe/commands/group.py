"""`ane-moe group`: which experts share a function."""

import json
from pathlib import Path
from typing import Annotated

import typer


def group(
    trace: Annotated[Path, typer.Argument(help="A routing trace.", metavar="TRACE.npz", show_default=False)],
    out: Annotated[Path, typer.Option(help="Write the grouping here.", metavar="FILE.json", show_default=False)],
    experts_per_function: Annotated[int, typer.Option(help="Experts that share a function.", min=1)] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Group experts that tokens choose together, so that a token calls few functions.

    The groups are found on two thirds of the trace's tokens; what they gain over index order is counted on the rest.
    """
    from rich.console import Console

    from ane_moe.report.routing_table import grouping_table
    from ane_moe.routing.grouping import group_experts, write_grouping
    from ane_moe.routing.routing_trace import read_trace

    report = group_experts(read_trace(trace), experts_per_function)
    write_grouping(report.grouping, out)
    if as_json:
        typer.echo(json.dumps({"file": str(out)} | report.as_json(), indent=2))
    else:
        Console().print(grouping_table(report), soft_wrap=True)
