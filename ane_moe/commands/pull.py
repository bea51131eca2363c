"""`ane-moe pull`: a conversion from the Hugging Face Hub."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ane_moe.commands.options import AsJson, written_here


def pull(
    name: Annotated[
        str,
        typer.Argument(help="The repository.", metavar="OWNER/NAME[@REVISION]", show_default=False),
    ],
    folder: Annotated[
        Path,
        typer.Argument(
            help="A new or empty folder.", metavar="DIR", callback=written_here, show_default=False
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Fetch a conversion from the Hugging Face Hub, and check every file by the manifest's digests.

    What the manifest does not name is not fetched. The same command goes on after a break.
    """
    from ane_moe.hub.pulled import pull as fetch
    from ane_moe.report.step_bar import step_bar

    with step_bar() as progress:
        manifest = fetch(name, folder, progress)
    if as_json:
        found = {"folder": str(folder), "files": len(manifest.files), "family": manifest.family}
        typer.echo(json.dumps(found, indent=2))
        return
    typer.echo(f"{len(manifest.files)} files fetched into {folder}, all as the manifest names them")
    golden = "" if manifest.golden else " --checkpoint CHECKPOINT"
    typer.echo(f"next: ane-moe verify {folder}{golden}")
