"""`ane-moe demo`: the built-in model as a checkpoint folder."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.", metavar="DIR")],
) -> None:
    """Write the built-in trained model to DIR, as a Hugging Face checkpoint."""
    from ane_moe.demo import copy_demo

    typer.echo(copy_demo(folder))
