"""`ane-moe align`: adapters that tell early which experts, and which tokens, will come."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ane_moe.commands.options import AsJson, Out
from ane_moe.errors import UserError
from ane_moe.origins import shown


def align(
    source: Out,
    text: Annotated[
        Path,
        typer.Option(
            help="Text to fit on: UTF-8, parted by lines of ---, or .json texts or ids.",
            metavar="FILE",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Write the adapters here.", metavar="FILE.npz", show_default=False)
    ],
    rank: Annotated[int, typer.Option(help="Of an adapter, d x r x d.", min=1)] = 24,
    distances: Annotated[
        str, typer.Option(help="Layers with experts that lie between: guesses so far ahead.")
    ] = "1,2,4",
    max_tokens: Annotated[int, typer.Option(help="Tokens in all.", min=3)] = 6144,
    runtime: Annotated[str, typer.Option(help="reference, coreml or auto.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Fit adapters from each layer's hidden state to that of later layers, and say how well they
    guess experts.

    `convert --early` lets shards guess experts by them, `generate --predictor adapter` the host;
    `generate --self-speculate` drafts tokens.
    Figures are of the third of the passages that is left out of the fit.
    """
    from rich.console import Console

    from ane_moe.early_adapters import write_adapters
    from ane_moe.report.cache_table import alignment_table
    from ane_moe.report.step_bar import step_bar
    from ane_moe.routing.alignment import align as fitted

    with step_bar() as progress:
        found = fitted(
            source,
            text,
            rank=rank,
            distances=_distances(distances),
            max_tokens=max_tokens,
            runtime=runtime,
            progress=progress,
        )
    write_adapters(found.adapters, out)
    if as_json:
        typer.echo(json.dumps({"file": str(out)} | found.as_json(), indent=2))
        return
    Console().print(alignment_table(found), soft_wrap=True)
    typer.echo(
        f"next: ane-moe generate {shown(source)} --adapters {out} --self-speculate 3", err=True
    )


def _distances(text: str) -> list[int]:
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise UserError(
            "--distances are whole numbers of layers", repr(text), "write 1,2,4"
        ) from None
