"""`ane-moe convert`: checkpoint to shards."""

import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from ane_moe.commands.options import AdapterFolders, AsJson
from ane_moe.errors import UserError

WORKERS = min(2, os.cpu_count() or 1)  # more of them wait for the disk
STAMPING = "ane_moe.conversion.stamping"  # what worker processes do
INTERRUPTED = 130  # what a shell reports of a program that Ctrl-C ended


def convert(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A Hugging Face model folder, a GGUF file, the address of one, "
            "OWNER/NAME[@REVISION] on the Hub, or `demo`.",
            metavar="CHECKPOINT",
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(help="The folder to write, or an address: s3://BUCKET/OUT.", metavar="OUT"),
    ],
    format_: Annotated[
        Literal["mlpackage", "aimodel"],
        typer.Option("--format", help="mlpackage: for Core ML. aimodel: for Core AI (macOS 27)."),
    ] = "mlpackage",
    routing: Annotated[
        Literal["masked", "soft", "sparse", "stream"],
        typer.Option(
            help="masked: all experts, exact top-k gates. sparse: one function per expert, "
            "called by the host. stream: experts in a store, read when they are chosen. "
            "soft: the full softmax, another function than the model's."
        ),
    ] = "masked",
    state: Annotated[
        Literal["mlstate", "explicit"],
        typer.Option(help="KV cache as Core ML state, or as inputs and outputs."),
    ] = "mlstate",
    inputs: Annotated[
        Literal["ids", "embeds"],
        typer.Option(help="embeds: embeddings enter; the embedding table is left out."),
    ] = "ids",
    layout: Annotated[
        Literal["bc1s", "bct1"],
        typer.Option(help="Axis order of the streams: [1,C,1,T] or [1,C,T,1]."),
    ] = "bc1s",
    context: Annotated[
        int | None, typer.Option(help="Tokens of the KV cache. [default: 2048, or the model's]")
    ] = None,
    prefill: Annotated[
        int, typer.Option(help="Tokens of a prefill call; 0: decode functions only.")
    ] = 64,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="encoders: token counts to make functions for.",
            metavar="LIST",
            show_default="32,128,512",
        ),
    ] = None,
    max_shard_mb: Annotated[
        int, typer.Option(help="Split MoE layers into shards of at most this size.")
    ] = 220,
    expert_tokens: Annotated[
        str, typer.Option(help="sparse: token counts to make expert functions for.", metavar="LIST")
    ] = "1,16,64",
    experts_per_function: Annotated[
        str | None,
        typer.Option(
            help="sparse: experts computed by one function; auto: as many as --target takes to "
            "place it. [default: 1, or auto with --target]",
            metavar="N|auto",
        ),
    ] = None,
    grouping: Annotated[
        Path | None,
        typer.Option(
            help="sparse: the experts of each function, as `ane-moe group` wrote them.",
            metavar="FILE.json",
        ),
    ] = None,
    layers_per_shard: Annotated[
        str | None,
        typer.Option(
            help="masked, dense: this many whole layers in one shard, if --max-shard-mb allows; "
            "auto: as many as --target takes. [default: 1, or auto with --target]",
            metavar="N|auto",
        ),
    ] = None,
    compress: Annotated[
        str,
        typer.Option(
            help="Weight format, preset (safe, small, tiny) or .toml recipe; as-stored: the codes "
            "of a quantised checkpoint, carried over.",
            metavar="FORMAT",
        ),
    ] = "int8",
    lut_group: Annotated[
        Literal["8", "16", "32", "tensor"] | None,
        typer.Option(help="Output channels that share a palette."),
    ] = None,
    lut_vector: Annotated[
        Literal["2", "4"] | None, typer.Option(help="Weights that a palette's entry stands for.")
    ] = None,
    recover_rank: Annotated[
        int | None,
        typer.Option(help="Singular directions of each matrix to keep apart in fp16.", metavar="R"),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            help="Text that shows which inputs matter: a file, or `builtin`.", metavar="FILE"
        ),
    ] = None,
    budget_mb: Annotated[
        float | None,
        typer.Option(help="Choose formats so that all weights take this many MB.", min=0.001),
    ] = None,
    min_cosine: Annotated[
        float | None,
        typer.Option(help="Choose the smallest formats that keep this cosine.", min=0.0, max=1.0),
    ] = None,
    ignore_tensors: Annotated[
        list[str] | None,
        typer.Option(
            help="Leave out tensors that the model does not need; repeat for more.",
            metavar="PATTERN",
        ),
    ] = None,
    adapter: AdapterFolders = None,
    adapter_mode: Annotated[
        Literal["merge", "switch"],
        typer.Option(
            help="merge: into the weights. switch: beside them, each with functions of its own, "
            "for `generate --adapter NAME`."
        ),
    ] = "merge",
    stream_scale: Annotated[
        str,
        typer.Option(
            help="Divide hidden states by N, a power of two, which keeps them inside fp16 and "
            "changes no result; auto: by what a golden or a calibration shows a need for.",
            metavar="auto|off|N",
        ),
    ] = "auto",
    early: Annotated[
        Path | None,
        typer.Option(
            help="sparse, stream: let attention shards guess experts of later layers, by what "
            "`ane-moe align` fitted to a conversion of this model.",
            metavar="FILE.npz",
            show_default=False,
        ),
    ] = None,
    ahead: Annotated[
        int | None,
        typer.Option(help="early: of so many layers ahead.", min=1, show_default="1"),
    ] = None,
    roster: Annotated[
        bool,
        typer.Option("--roster", help="Let `generate --roster` disturb the choice of experts."),
    ] = False,
    tracks: Annotated[
        Literal["apart", "packed"],
        typer.Option(help="Parallel tracks: a package for each, or one for those of a block."),
    ] = "apart",
    ring_caches: Annotated[
        bool,
        typer.Option(
            "--ring-caches",
            help="Caches no longer than a layer's window. [tracks: always]",
        ),
    ] = False,
    layers: Annotated[
        str | None, typer.Option(help="Convert only these, such as 0-3 or 0,5.", metavar="LIST")
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            help="Let the workers of this Dask scheduler convert, instead of processes here, or "
            "those of jobs that a .toml file has a batch system begin.",
            metavar="tcp://HOST:PORT|FILE.toml",
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(help="Processes that convert layers side by side.", min=1)
    ] = WORKERS,
    golden: Annotated[
        bool, typer.Option("--golden", help="Also capture the original model's outputs.")
    ] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts for --golden: text parted by lines of ---, or .json texts or ids."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace another conversion in OUT.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan; read and write no weights.")
    ] = False,
    target: Annotated[
        str | None,
        typer.Option(
            help="The chip to choose sizes for, and whose placement rules to warn of. [default: "
            "m4-max, for warnings alone]",
            metavar="CHIP",
        ),
    ] = None,
    system: Annotated[
        int | None,
        typer.Option(
            "--os",
            help="The system whose placement rules to warn of: 15, 26 or 27.",
            show_default="26",
        ),
    ] = None,
    allow_cpu: Annotated[
        bool,
        typer.Option(
            "--allow-cpu",
            help="Weight formats that take the model off the engine of --target, too.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Convert a checkpoint into shards for Core ML, or for Core AI. Run it again to go on after an
    interruption."""
    from ane_moe.addresses import from_anywhere, named, output_place
    from ane_moe.checkpoints.hub import local_folder
    from ane_moe.conversion.workers import open_workers, prepare
    from ane_moe.manifest import FILE_NAME

    out = output_place(out)
    if cluster:  # its workers are in folders of their own
        out = from_anywhere(out)
    may_be_done = (out / FILE_NAME).exists() and not overwrite
    if not dry_run and not may_be_done and not cluster:
        prepare(workers, STAMPING)
    from ane_moe.conversion.job import job_of, plan_of
    from ane_moe.conversion.pipeline import carry_out
    from ane_moe.conversion.plan import DISPATCHED, MAX_LENGTH, ConvertOptions
    from ane_moe.conversion.planner import MAX_EXPERT_TOKENS
    from ane_moe.demo import built_in
    from ane_moe.forecast.concerns import concerns_of_plan, require_engine_formats
    from ane_moe.forecast.core_ai import faults_of
    from ane_moe.forecast.design import AUTO, sizes_of
    from ane_moe.formats.recipe import find_recipe, recipe_of
    from ane_moe.number_lists import parse_counts, parse_layers
    from ane_moe.opened import open_model
    from ane_moe.original.checkpoint_tokenizer import require_tokenizer
    from ane_moe.placement.targets import DEFAULT_OS, DEFAULT_TARGET, find_target
    from ane_moe.report.convert_table import (
        ConvertBar,
        plan_document,
        print_plan,
        print_report,
        report_document,
        warning,
    )

    if grouping is not None:
        from ane_moe.routing.grouping import read_grouping

        groups = read_grouping(grouping)
        if experts_per_function not in (None, str(groups.experts_per_function)):
            raise UserError(
                "--grouping and --experts-per-function disagree",
                f"{groups.experts_per_function} in {grouping}, {experts_per_function} given",
                "leave --experts-per-function out",
            )
        experts_per_function = str(groups.experts_per_function)
    if ahead is not None and early is None:
        raise UserError(
            "--ahead says how far shards guess experts",
            "no --early",
            "give --early FILE, or leave it out",
        )
    ruled = {"--target": target, "--os": system, "--allow-cpu": allow_cpu}
    if format_ == "aimodel" and (given := [name for name, value in ruled.items() if value]):
        raise UserError(
            f"{given[0]} is of Core ML's placement rules",
            "--format aimodel",
            f"leave {given[0]} out: nothing is known of where Core AI runs a graph",
        )
    place = find_target(target or DEFAULT_TARGET, system or DEFAULT_OS)
    recipe = find_recipe(
        compress, group=lut_group, vector=int(lut_vector or 0) or None, rank=recover_rank
    )
    if target and not allow_cpu:
        require_engine_formats(recipe, place)
    only = None if layers is None else parse_layers(layers)
    walked = golden or calibrate or budget_mb or min_cosine  # through all layers before the last
    needed = range(max(only) + 1) if only and walked else only
    fetched = () if dry_run else needed
    source = local_folder(built_in(checkpoint), fetched, apart=cluster is not None)
    source = source.absolute() if cluster else source
    unsaid = AUTO if target else "1"
    asked = (
        experts_per_function or (unsaid if routing == "sparse" else "1"),
        layers_per_shard or (unsaid if routing not in DISPATCHED else "1"),
    )
    windows = None if lengths is None else parse_counts(lengths, "--lengths", 1, MAX_LENGTH)
    left = tuple(ignore_tensors or ())
    model = open_model(source, left, adapter or (), adapter_mode)
    experts, layers_together = sizes_of(model.spec, asked, place, context, prefill, windows)
    options = ConvertOptions(
        routing=routing,
        state=state,
        layout=layout,
        context=context,
        prefill=prefill,
        max_shard_mb=max_shard_mb,
        layers=only,
        expert_tokens=parse_counts(expert_tokens, "--expert-tokens", 1, MAX_EXPERT_TOKENS),
        experts_per_function=experts,
        layers_per_shard=layers_together,
        recipe=recipe,
        groups={} if grouping is None else groups.layers,
        calibrate=calibrate,
        budget_mb=budget_mb,
        min_cosine=min_cosine,
        ignore_tensors=left,
        lengths=windows,
        stream_divisor=_divisor(stream_scale),
        roster=roster,
        inputs=inputs,
        ring_caches=ring_caches,
        tracks=tracks,
        adapters=tuple(map(str, adapter or ())),
        adapter_mode=adapter_mode,
        format=format_,
        early=None if early is None else str(early),
        ahead=ahead or 1,
    )
    job = job_of(model, out, options)
    stored = job.plan.options.recipe  # with the forms that the checkpoint has
    if target and not allow_cpu:
        require_engine_formats(stored, place)
    warned = format_ == "mlpackage"  # the rules are Core ML's
    concerns = concerns_of_plan(job.plan, place) if warned else ()
    warnings = [warning(concern, place) for concern in concerns]
    warnings += [] if warned else faults_of(stored.formats)
    if dry_run:
        require_tokenizer(job.checkpoint.folder)
        _print_all(warnings)
        document = plan_document(job.plan, concerns)
        typer.echo(json.dumps(document, indent=2)) if as_json else print_plan(job.plan)
        return
    try:
        with (
            open_workers(workers, STAMPING, cluster, out) as those,
            ConvertBar(warnings) as bar,
        ):
            report = carry_out(
                job,
                workers=those,
                golden=golden,
                prompts=prompts,
                overwrite=overwrite,
                progress=bar.update,
            )
    except KeyboardInterrupt:
        typer.echo(
            f"ane-moe: interrupted; finished shards are kept in {named(out)}: run the same command "
            "again",
            err=True,
        )
        raise typer.Exit(INTERRUPTED) from None
    # A budget chose formats of its own.
    chosen = recipe_of(report.manifest.weights, report.manifest.recipe)
    final = concerns
    if warned and chosen != stored:
        final = concerns_of_plan(plan_of(model, replace(options, recipe=chosen)), place)
    _print_all(warning(concern, place) for concern in final if concern not in concerns)
    faults = () if warned else faults_of(chosen.formats)
    _print_all(fault for fault in faults if fault not in warnings)
    document = report_document(report, final)
    if as_json:
        typer.echo(json.dumps(document, indent=2))
    else:
        print_report(report, named(checkpoint))


def _divisor(text: str) -> int | None:
    """Of `auto` none: whoever converts finds it."""
    known = {"auto": None, "off": 1}
    if text in known:
        return known[text]
    if not text.isdecimal():
        raise UserError("--stream-scale is not possible", repr(text), "give auto, off or a number")
    return int(text)


def _print_all(lines: Iterable[str]) -> None:
    for line in lines:
        typer.echo(line, err=True)
