"""The options of `ane-moe bench`, by what they are of."""

from pathlib import Path
from typing import Annotated, Literal

import typer

# What is timed.
Runs = Annotated[int, typer.Option(help="Warm calls of each function that count.")]
Warmup = Annotated[int, typer.Option(help="Calls before them.")]
Tokens = Annotated[int, typer.Option(help="Tokens decoded at each context fill.")]
Fills = Annotated[
    str | None,
    typer.Option(
        help="Tokens in the context before decoding.",
        metavar="LIST",
        show_default="none, a quarter, half, and full but for the tokens decoded",
    ),
]
Lengths = Annotated[
    str | None,
    typer.Option(
        help="Prompt lengths to prefill.",
        metavar="LIST",
        show_default="1, 4 and 16 prefill calls",
    ),
]
Units = Annotated[
    Literal["cpu_and_ne", "cpu_only", "all"] | None,
    typer.Option(help="Core ML's compute units.", show_default="cpu_and_ne"),
]
Energy = Annotated[
    bool,
    typer.Option(
        "--energy",
        help="macOS: energy per token, by powermetrics (needs root: run `sudo -v` before).",
    ),
]

# What it is held against.
MinLogitCosine = Annotated[
    float | None,
    typer.Option(
        help="Mean cosine the logits must reach, or no speed is reported.",
        show_default="0.99 for fp16 weights, 0.9 compressed",
    ),
]
Vs = Annotated[
    Literal["mlx"] | None,
    typer.Option(help="Run the same prompt through mlx-lm, if it is installed."),
]
VsModel = Annotated[
    Path | None,
    typer.Option(help="For --vs: the checkpoint, or its mlx conversion.", metavar="FOLDER"),
]
Against = Annotated[Path | None, typer.Option(help="Compare with a saved report.", metavar="FILE")]

# Where figures go.
Save = Annotated[Path | None, typer.Option(help="Write the report here, as JSON.", metavar="FILE")]
Html = Annotated[Path | None, typer.Option(help="Also write the figures as a page (see `report`).")]
