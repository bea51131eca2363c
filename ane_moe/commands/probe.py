"""`ane-moe probe`: what Core ML of this Mac estimates, as one small file to send."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ane_moe.commands.options import AsJson


def probe(
    folder: Annotated[
        Path, typer.Argument(help="Where to write placement-feedback.json.", show_default=".")
    ] = Path("."),
    as_json: AsJson = False,
) -> None:
    """On a Mac: have Core ML place small packages, and write what it estimates into one file.

    The file fills what ane_moe/placement/estimates.toml does not know of this chip and system:
    send it. It has operations, sizes, estimates, chip and system; no names, paths or weights of
    yours.
    """
    from ane_moe.placement.check import probe_machine
    from ane_moe.report.step_bar import step_bar

    with step_bar() as progress:
        found = probe_machine(folder, progress=progress)
    if as_json:
        typer.echo(json.dumps(found.document, indent=2))
        return
    estimates, ops = len(found.document["estimates"]), found.ops
    machine = f"{found.document['chip']}, OS {found.document['os']}"
    typer.echo(f"{machine}: {ops} operations placed, estimates of {estimates} read")
    if not estimates:
        typer.echo("Core ML left no estimates that could be read; the placements are in the file")
    typer.echo(f"next: send {found.path} (python scripts/refit_placement.py reads it)")
