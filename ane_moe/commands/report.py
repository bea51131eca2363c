"""`ane-moe report`: one page that says all there is to say of a conversion."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ane_moe.commands.options import Out, PlacementSystem, RuntimeName

if TYPE_CHECKING:
    from ane_moe.verification.result import VerifyReport

Html = Annotated[
    Path | None,
    typer.Option(
        help="The page to write. [default: OUT/report.html, or report.html here for one "
        "that is fetched]"
    ),
]
Markdown = Annotated[Path | None, typer.Option(help="Also write the content as Markdown.")]
Bench = Annotated[Path | None, typer.Option(help="Figures saved by `bench --save`.")]
Trace = Annotated[
    Path | None, typer.Option(help="A routing trace, in place of the golden's few tokens.")
]
Verify = Annotated[bool, typer.Option(help="Verify first, where there is a golden.")]
Target = Annotated[str, typer.Option(help="Chip to predict placement and speed for.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print paths and verdict as one JSON document.")
]


def report(
    out: Out,
    html: Html = None,
    markdown: Markdown = None,
    bench: Bench = None,
    trace: Trace = None,
    verify: Verify = True,
    target: Target = "m4-max",
    system: PlacementSystem = 26,
    runtime: RuntimeName = "auto",
    as_json: AsJson = False,
) -> None:
    """Write an HTML page: verdict, parity, placement, routing, speed, weights, conditions. No
    network, no scripts.

    Prints what verifying found. Exits with 1 when a gate failed; the page is written all the same.
    """
    from ane_moe.files import write_named_by_user
    from ane_moe.manifest import read_manifest
    from ane_moe.origins import origin_of
    from ane_moe.package_form import PACKAGE
    from ane_moe.placement.check import check_placement
    from ane_moe.placement.targets import find_target
    from ane_moe.report.html import render_html
    from ane_moe.report.markdown import render_markdown
    from ane_moe.report.report_data import gather
    from ane_moe.report.step_bar import step_bar
    from ane_moe.verification.verify import verify as prove

    chip, manifest = find_target(target, system), read_manifest(out)
    with step_bar() as progress:
        result = None
        if verify and manifest.golden is not None:
            result = prove(out, runtime=runtime, progress=progress)
        sound = result is None or not result.integrity
        told = manifest.package_form == PACKAGE  # of Core AI's nothing is known
        placement = None
        if sound and told:
            placement = check_placement(out, chip, runtime=runtime, progress=progress)
        data = gather(
            out, verify=result, placement=placement, bench=bench, trace=trace, target=target
        )
    page = html or (Path() if origin_of(out) else out) / "report.html"
    write_named_by_user(page, render_html(data))
    if markdown:
        write_named_by_user(markdown, render_markdown(data))
    if as_json:
        paths = {"html": str(page), "markdown": str(markdown) if markdown else None}
        typer.echo(json.dumps(paths | {"passed": data.passed}, indent=2))
    else:
        _show(result)
        typer.echo(f"report: {page}" + (f", {markdown}" if markdown else ""))
    if data.passed is False:
        raise typer.Exit(1)


def _show(result: "VerifyReport | None") -> None:
    from rich.console import Console

    from ane_moe.report.verify_table import verify_report

    if result:
        Console().print(verify_report(result), soft_wrap=True)
