"""`ane-moe trace`: which experts tokens choose."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ane_moe.commands.options import AsJson, opened_out

Source = Annotated[
    Path,
    typer.Argument(
        help="A conversion (hf://OWNER/NAME: one on the Hub), a Hugging Face model folder or "
        "OWNER/NAME, or `demo`.",
        metavar="OUT|CHECKPOINT",
        callback=opened_out,
        show_default=False,
    ),
]
CorpusFile = Annotated[
    Path,
    typer.Option(
        help="Text to run: UTF-8, parted by lines of ---, or .json texts or ids.",
        metavar="FILE",
        show_default=False,
    ),
]
TraceOut = Annotated[
    Path, typer.Option(help="Write the trace here.", metavar="FILE.npz", show_default=False)
]
Window = Annotated[
    int | None,
    typer.Option(
        help="Tokens of a passage; each begins with an empty context.",
        show_default="512 or the context",
        min=1,
    ),
]
MaxTokens = Annotated[int, typer.Option(help="Tokens in all.", min=1)]
Runtime = Annotated[str, typer.Option(help="For a conversion: reference, coreml or auto.")]


def trace(
    source: Source,
    text: CorpusFile,
    out: TraceOut,
    window: Window = None,
    max_tokens: MaxTokens = 8192,
    runtime: Runtime = "auto",
    as_json: AsJson = False,
) -> None:
    """Record the experts and weights every token chooses, layer by layer.

    A conversion runs its shards, a checkpoint Hugging Face's own model in fp32. The file is an .npz
    with a documented schema (docs/routing.md); `ane-moe group` reads it.
    """
    from rich.console import Console

    from ane_moe.checkpoints.hub import local_folder
    from ane_moe.demo import built_in
    from ane_moe.report.routing_table import trace_table
    from ane_moe.report.step_bar import step_bar
    from ane_moe.routing.recorder import record
    from ane_moe.routing.routing_trace import write_trace
    from ane_moe.routing.statistics import summarise

    folder = local_folder(built_in(source))
    with step_bar() as progress:
        found = record(
            folder, text, window=window, max_tokens=max_tokens, runtime=runtime, progress=progress
        )
        write_trace(found, out)
        progress("playing caches through", 0, 1)
        summary = summarise(found)
    if as_json:
        typer.echo(json.dumps({"file": str(out)} | summary.as_json(), indent=2))
    else:
        Console().print(trace_table(summary), soft_wrap=True)
