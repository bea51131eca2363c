"""`ane-moe verify`: prove a conversion right."""

from functools import partial
from pathlib import Path

import typer

from ane_moe.commands import verify_options as option
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
    checkpoint: option.Checkpoint = None,
    prompts: option.Prompts = None,
    adapter: AdapterFolders = None,
    runtime: RuntimeName = "auto",
    precision: PrecisionName = "fp32",
    min_cosine: option.MinCosine = None,
    min_logit_cosine: option.MinLogitCosine = None,
    decode_tokens: option.DecodeTokens = 32,
    quick: option.Quick = False,
    fresh: option.Fresh = False,
    cluster: option.Cluster = None,
    against: option.Against = None,
    compute_plan: option.ComputePlan = False,
    target: option.Target = "m4-max",
    system: PlacementSystem = 26,
    allow: option.Allow = None,
    require_measured: option.RequireMeasured = False,
    html: option.Html = None,
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
    from ane_moe.commands.findings import find, next_diff, show, write_page
    from ane_moe.demo import built_in
    from ane_moe.manifest import read_manifest
    from ane_moe.origins import shown
    from ane_moe.placement.check import check_placement, require_packages
    from ane_moe.placement.targets import find_target
    from ane_moe.verification.against import check_against, require_programs
    from ane_moe.verification.verify import verify as prove

    chip, manifest = find_target(target, system), read_manifest(out)
    if compute_plan:
        require_packages(manifest)
    if against:
        require_programs(manifest)
    bare = checkpoint is None and manifest.golden is None
    others_only = bool(compute_plan or against) and bare
    if others_only:
        _require_no(cluster, out)
    proving = partial(
        prove,
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
    )
    placing = partial(
        check_placement,
        out,
        chip,
        runtime=runtime,
        allow=tuple(allow or ()),
        require_measured=require_measured,
    )
    found = find(
        out,
        None if others_only else proving,
        placing if compute_plan else None,
        partial(check_against, out, against, min_cosine=min_cosine) if against else None,
    )
    if others_only:
        alone = f"only {found.besides(against)} is checked"
        typer.echo(f"no golden in OUT and no --checkpoint: {alone}", err=True)
    show(found, as_json)
    if html:
        write_page(found, html, target)
    if (parted := next_diff(found)) and not as_json:
        typer.echo(parted)
    if not found.passed:
        raise typer.Exit(1)
    if not as_json:
        typer.echo(f"next: ane-moe {'report' if html is None else 'bench'} {shown(out)}")


def _require_no(cluster: str | None, out: Path) -> None:
    """Raise UserError for workers where there is no golden to prove functions by."""
    if cluster is not None:
        raise UserError(
            "--cluster has workers prove functions by the golden",
            f"no golden in {out}",
            "leave it out, or convert with --golden",
        )
