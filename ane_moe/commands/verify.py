"""`ane-moe verify`: prove a conversion right."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ane_moe.commands.options import (
    AdapterFolders,
    AsJson,
    Out,
    PlacementSystem,
    PrecisionName,
    RuntimeName,
)
from ane_moe.errors import UserError


def verify(
    out: Out,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Capture the golden from this checkpoint (as of `convert`) now, instead of "
            "reading the one in OUT."
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help=(
                "Prompts for --checkpoint: text parted by lines of ---, or a .json list of texts "
                "or token ids."
            )
        ),
    ] = None,
    adapter: AdapterFolders = None,
    runtime: RuntimeName = "auto",
    precision: PrecisionName = "fp32",
    min_cosine: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Cosine every function must reach.",
            show_default="0.999 for fp16 weights, 0.97 compressed",
        ),
    ] = None,
    min_logit_cosine: Annotated[
        float | None,
        typer.Option(
            help="Mean cosine the whole model's logits must reach.",
            show_default="0.99 for fp16 weights, 0.9 compressed",
        ),
    ] = None,
    decode_tokens: Annotated[
        int,
        typer.Option(
            min=0,
            help="Tokens for one-token calls where prefill covers all of them; 0 for no limit.",
        ),
    ] = 32,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Look at a few layers, experts and prompts only; the result says which."
        ),
    ] = False,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Do not go on with what a run that was broken off proved."),
    ] = False,
    cluster: Annotated[
        str | None,
        typer.Option(
            help="Let the workers of this Dask scheduler, which see OUT or its address, prove the "
            "functions (see `convert`).",
            metavar="tcp://HOST:PORT|FILE.toml",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help=(
                "Also: each distinct part by the reference runtime and by this one, coreai or "
                "coreml, on the same inputs."
            ),
            metavar="RUNTIME",
            show_default=False,
        ),
    ] = None,
    compute_plan: Annotated[
        bool,
        typer.Option(
            "--compute-plan",
            help="Also: the engine each operation runs on. Measured on macOS, else predicted.",
        ),
    ] = False,
    target: Annotated[
        str, typer.Option(help="Chip to predict placement for: m1 ... m5-max, iphone-a17 ...")
    ] = "m4-max",
    system: PlacementSystem = 26,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            help="An operation type that may be off the engine; repeat for more.", metavar="OP"
        ),
    ] = None,
    require_measured: Annotated[
        bool, typer.Option("--require-measured", help="Fail when placement can only be predicted.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(help="Also write the results as a page (see `report`).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check the shards in OUT against the original model.

    Files first (sha256, missing and extra shards, NaN in weights), then the tokenizer's ids against
    the checkpoint's, then every function of every shard on the golden's inputs, then routing, then
    the whole model. Exits with 1 when a gate fails. With --precision engine all of it by the Neural
    Engine's published arithmetic, beside exact sums: whether routing flips, what overflows on the
    way, what it costs. With --against coreai, Apple's own Core AI runtime, on Linux too, is the
    judge of ours. With --compute-plan or --against, a conversion without a golden is checked for
    that alone. Ctrl-C keeps what was proved: the same command goes on.
    """
    from rich.console import Console

    from ane_moe.demo import built_in
    from ane_moe.hub.fetched import address_of, shown
    from ane_moe.manifest import read_manifest
    from ane_moe.placement.check import check_placement, require_packages
    from ane_moe.placement.targets import find_target
    from ane_moe.report.against_table import against_report
    from ane_moe.report.placement_table import placement_report
    from ane_moe.report.step_bar import step_bar
    from ane_moe.report.verify_table import verify_report
    from ane_moe.verification.against import check_against, require_programs
    from ane_moe.verification.verify import verify as run

    chip = find_target(target, system)
    manifest = read_manifest(out)
    if compute_plan:
        require_packages(manifest)
    if against:
        require_programs(manifest)
    bare = checkpoint is None and manifest.golden is None
    others_only = bool(compute_plan or against) and bare
    if others_only and cluster is not None:
        raise UserError(
            "--cluster has workers prove functions by the golden",
            f"no golden in {shown(out)}",
            "leave it out, or convert with --golden",
        )
    report = placement = second = None
    with step_bar() as progress:
        if not others_only:
            try:
                report = run(
                    out,
                    checkpoint=checkpoint and built_in(checkpoint),
                    prompts=prompts,
                    runtime=runtime,
                    precision=precision,
                    min_cosine=min_cosine,
                    min_logit_cosine=min_logit_cosine,
                    decode_tokens=decode_tokens or None,
                    quick=quick,
                    fresh=fresh,
                    adapters=tuple(adapter or ()),
                    cluster=cluster,
                    progress=progress,
                )
            except KeyboardInterrupt:
                typer.echo(
                    "broken off: what was proved is kept, the same command goes on", err=True
                )
                raise typer.Exit(130) from None
        if compute_plan and not (report and report.integrity):
            placement = check_placement(
                out,
                chip,
                runtime=runtime,
                allow=tuple(allow or ()),
                require_measured=require_measured,
                progress=progress,
            )
        if against and not (report and report.integrity):
            second = check_against(out, against, min_cosine=min_cosine, progress=progress)
    if others_only:
        checked = [name for name, part in (("placement", placement), (against, second)) if part]
        what = " and ".join(map(str, checked))
        typer.echo(f"no golden in OUT and no --checkpoint: only {what} is checked", err=True)
    passed = all(part.passed for part in (report, placement, second) if part is not None)
    if as_json:
        document = report.as_json() if report else {"folder": shown(out)}
        document |= {"placement": placement.as_json()} if placement else {}
        document |= {"against": second.as_json()} if second else {}
        typer.echo(json.dumps(document | {"passed": passed}, indent=2))
    else:
        parts = [
            verify_report(report) if report else None,
            placement_report(placement) if placement else None,
            against_report(second) if second else None,
        ]
        Console().print(*filter(None, parts), sep="\n", soft_wrap=True)  # a path stays on one line
    if html:
        from ane_moe.files import write_named_by_user
        from ane_moe.report.html import render_html
        from ane_moe.report.report_data import gather

        write_named_by_user(
            html, render_html(gather(out, verify=report, placement=placement, target=target))
        )
    if second and not as_json:
        for row in [row for row in second.pairs if not row.passed][:1]:
            package = f"{address_of(out) or out}/{row.path}"
            where = f"{package} --function {row.function} --runtime-b {second.runtime}"
            typer.echo(f"next: ane-moe diff {where}  # the first operation where they part")
    if not passed:
        raise typer.Exit(1)
    if not as_json:
        then = "report" if html is None else "bench"
        typer.echo(f"next: ane-moe {then} {shown(out)}")
