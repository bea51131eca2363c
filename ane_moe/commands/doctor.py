"""`ane-moe doctor`: this machine, as ane-moe sees it."""

import json

import typer

from ane_moe.commands.options import AsJson


def doctor(as_json: AsJson = False) -> None:
    """Look at this machine: versions, Core ML, cores, memory, disk; what is measured on it and what
    predicted.

    Exits with 1 when a package that is needed is missing, or of a version that does not fit.
    """
    from ane_moe.installation import installation
    from ane_moe.report.installation_table import installation_lines

    found = installation()
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=2))
    else:
        typer.echo("\n".join(installation_lines(found)))
    if not found.sound:
        raise typer.Exit(1)
