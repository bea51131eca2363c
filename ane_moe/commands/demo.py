"""`ane-moe demo`: a built-in model as a checkpoint folder."""

from pathlib import Path
from typing import Annotated

import typer

from ane_moe.commands.options import written_here
from ane_moe.demo import DEMOS, LANGUAGE, copy_demo
from ane_moe.errors import UserError


def demo(
    name: Annotated[
        str,
        typer.Argument(help=f"One of {', '.join(DEMOS)}; without it {LANGUAGE}.", metavar="[NAME]"),
    ],
    folder: Annotated[
        Path | None,
        typer.Argument(help="A new or empty folder.", metavar="DIR", callback=written_here),
    ] = None,
) -> None:
    """Write a built-in trained model to DIR, as a Hugging Face checkpoint; its README.md says how
    well it was trained."""
    if folder is None and name in DEMOS:
        raise UserError(
            "the demo model needs a folder to be written to",
            f"only the name {name}",
            f"name one too: ane-moe demo {name} DIR",
        )
    typer.echo(copy_demo(Path(name)) if folder is None else copy_demo(folder, name))
