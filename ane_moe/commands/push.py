"""`ane-moe push`: a conversion to the Hugging Face Hub, with its card."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from ane_moe.commands.options import AsJson, Out, RuntimeName


def push(
    out: Out,
    name: Annotated[
        str,
        typer.Argument(help="The repository.", metavar="OWNER/NAME[@BRANCH]", show_default=False),
    ],
    verify: Annotated[
        bool, typer.Option(help="Verify first, where there is a golden; send nothing if it fails.")
    ] = True,
    licence: Annotated[
        str | None,
        typer.Option("--license", help="For the card.", show_default="the base model's on the Hub"),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository a private one.")
    ] = False,
    target: Annotated[str, typer.Option(help="Chip to predict speed for.")] = "m4-max",
    runtime: RuntimeName = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the card; send nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Send a conversion to the Hugging Face Hub, with a card of its gates, recipe and sizes.

    Files go in batches, the manifest last; the same command goes on after a break, and sends
    nothing twice. Exits with 1, and sends nothing, when a gate failed.
    """
    from ane_moe.hub.licence import licence_of
    from ane_moe.hub.pushed import push as send
    from ane_moe.manifest import read_manifest
    from ane_moe.origins import shown
    from ane_moe.report.card import render_card
    from ane_moe.report.report_data import gather
    from ane_moe.report.step_bar import step_bar
    from ane_moe.verification.verify import verify as run

    manifest, report = read_manifest(out), None
    with step_bar() as progress:
        if verify and manifest.golden is not None:
            report = run(out, runtime=runtime, progress=progress)
        data = gather(out, verify=report, target=target)
        if data.passed is False:
            typer.echo(f"a gate failed, nothing was sent: ane-moe verify {shown(out)}", err=True)
            raise typer.Exit(1)
        card = render_card(data, name.partition("@")[0], licence or licence_of(manifest.origin))
        if dry_run:
            typer.echo(json.dumps({"card": card}, indent=2) if as_json else card)
            return
        done = send(out, name, card, private=private, progress=progress)
    if as_json:
        typer.echo(json.dumps(asdict(done), indent=2))
        return
    size = f"{done.sent_bytes / 1e6:,.1f} MB"
    typer.echo(f"{done.sent} files, {size} sent, {done.kept} were there: {done.url}")
    typer.echo(f"next: ane-moe verify hf://{name}")
