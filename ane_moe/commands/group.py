"""`ane-moe group`: which experts share a function."""

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from ane_moe.commands.options import AsJson, TraceFile
from ane_moe.errors import UserError

Out = Annotated[
    Path, typer.Option(help="Write the grouping here.", metavar="FILE.json", show_default=False)
]
ExpertsPerFunction = Annotated[
    str,
    typer.Option(
        help=(
            "Experts that share a function, or `auto`: as many as the target is expected to "
            "run fastest."
        ),
        metavar="G|auto",
    ),
]
Target = Annotated[str, typer.Option(help="For auto: chip to predict for, m1 ... m5-max.")]
FormatName = Annotated[
    str,
    typer.Option(
        "--format",
        help="For auto: weight format of the conversion, such as fp16, int8 or lut4.",
    ),
]


def group(
    trace: TraceFile,
    out: Out,
    experts_per_function: ExpertsPerFunction = "auto",
    target: Target = "m4-max",
    form: FormatName = "int8",
    as_json: AsJson = False,
) -> None:
    """Group experts that tokens choose together, so that a token calls few functions.

    The groups are found on two thirds of the trace's tokens; what they gain over index order is
    counted on the rest.
    """
    from rich.console import Console

    from ane_moe.forecast.chips import find_chip
    from ane_moe.report.routing_table import grouping_table, size_table
    from ane_moe.routing.function_size import choose_size
    from ane_moe.routing.grouping import group_experts, write_grouping
    from ane_moe.routing.routing_trace import read_trace

    routing = read_trace(trace)
    choice = None
    if experts_per_function == "auto":
        choice = choose_size(routing, find_chip(target), form)
        report = choice.report
    elif re.fullmatch(r"[1-9]\d{0,4}", experts_per_function):
        report = group_experts(routing, int(experts_per_function))
    else:
        raise UserError("--experts-per-function takes a number or auto", repr(experts_per_function))
    write_grouping(report.grouping, out)
    if as_json:
        document = {"file": str(out)} | report.as_json() | {"choice": choice and choice.as_json()}
        typer.echo(json.dumps(document, indent=2))
    else:
        Console().print(
            *([size_table(choice)] if choice else []), grouping_table(report), soft_wrap=True
        )
