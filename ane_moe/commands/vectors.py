"""`ane-moe vectors`: what every function of a conversion is given and gives, for other hosts."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ane_moe.commands.options import AsJson, Out, RuntimeName, written_here


def vectors(
    out: Out,
    folder: Annotated[
        Path,
        typer.Argument(
            help="Where to write them.", metavar="DIR", callback=written_here, show_default=False
        ),
    ],
    tokens: Annotated[int, typer.Option(help="Tokens of the run.", min=1)] = 20,
    decoded: Annotated[
        int, typer.Option("--decode", help="How many of them are generated one by one.", min=0)
    ] = 4,
    runtime: RuntimeName = "auto",
    as_json: AsJson = False,
) -> None:
    """Write what goes through every port of every call in a short run, to test another host by.

    DIR/vectors.json lists the ids, the steps and the calls; DIR/vectors.safetensors has their
    inputs, outputs and logits. docs/hosts.md has the rules by which a host makes them.
    """
    from ane_moe.loop.vectors import INDEX, TENSORS, write_vectors

    found = write_vectors(out, folder, tokens=tokens, decoded=decoded, runtime=runtime)
    if as_json:
        paths = {"index": str(folder / INDEX), "tensors": str(folder / TENSORS)}
        counts = {"calls": len(found.calls), "tokens": len(found.ids)}
        typer.echo(json.dumps(paths | counts, indent=2))
    else:
        typer.echo(f"{len(found.calls)} calls of {len(found.ids)} tokens: {folder / INDEX}")
