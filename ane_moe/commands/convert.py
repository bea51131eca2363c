"""`ane-moe convert`: checkpoint to shards."""

import os
from collections.abc import Mapping
from pathlib import Path

from ane_moe.commands import convert_options as option
from ane_moe.commands.options import AdapterFolders, AsJson, Context
from ane_moe.errors import UserError

WORKERS = min(2, os.cpu_count() or 1)  # more of them wait for the disk
STAMPING = "ane_moe.conversion.stamping"  # what worker processes do
Groups = Mapping[int, tuple[tuple[int, ...], ...]]  # of experts, by layer
DIVISORS = {"auto": None, "off": 1}  # of `auto` none: whoever converts finds it


def convert(
    checkpoint: option.Checkpoint,
    out: option.Out,
    format_: option.Format = "mlpackage",
    routing: option.Routing = "masked",
    state: option.State = "mlstate",
    inputs: option.Inputs = "ids",
    layout: option.Layout = "bc1s",
    context: Context = None,
    prefill: option.Prefill = 64,
    lengths: option.Lengths = None,
    max_shard_mb: option.MaxShardMb = 220,
    expert_tokens: option.ExpertTokens = "1,16,64",
    experts_per_function: option.ExpertsPerFunction = None,
    grouping: option.Grouping = None,
    layers_per_shard: option.LayersPerShard = None,
    compress: option.Compress = "int8",
    lut_group: option.LutGroup = None,
    lut_vector: option.LutVector = None,
    recover_rank: option.RecoverRank = None,
    calibrate: option.Calibrate = None,
    budget_mb: option.BudgetMb = None,
    min_cosine: option.MinCosine = None,
    ignore_tensors: option.IgnoreTensors = None,
    adapter: AdapterFolders = None,
    adapter_mode: option.AdapterMode = "merge",
    stream_scale: option.StreamScale = "auto",
    early: option.Early = None,
    ahead: option.Ahead = None,
    roster: option.Roster = False,
    tracks: option.Tracks = "apart",
    ring_caches: option.RingCaches = False,
    layers: option.Layers = None,
    cluster: option.Cluster = None,
    workers: option.Workers = WORKERS,
    golden: option.Golden = False,
    prompts: option.Prompts = None,
    overwrite: option.Overwrite = False,
    dry_run: option.DryRun = False,
    target: option.Target = None,
    system: option.System = None,
    allow_cpu: option.AllowCpu = False,
    as_json: AsJson = False,
) -> None:
    """Convert a checkpoint into shards for Core ML, or for Core AI. Run it again to go on after an
    interruption."""
    out = _place(out, cluster)
    if not (dry_run or cluster or _may_be_done(out, overwrite)):
        _prepare(workers)
    from ane_moe.commands.conversion import Asked, carried_out, planned, show_plan, show_report
    from ane_moe.conversion.extent import MAX_EXPERT_TOKENS
    from ane_moe.conversion.job import require_early
    from ane_moe.conversion.plan import MAX_LENGTH, ConvertOptions
    from ane_moe.forecast.aim import aim_of
    from ane_moe.formats.recipe import find_recipe
    from ane_moe.number_lists import parse_counts, parse_layers

    experts_per_function, groups = _grouped(grouping, experts_per_function)
    require_early(early, ahead)
    aim = aim_of(target, system, allow_cpu, format_)
    vector = int(lut_vector or 0) or None
    options = ConvertOptions(
        routing=routing,
        state=state,
        layout=layout,
        context=context,
        prefill=prefill,
        max_shard_mb=max_shard_mb,
        layers=None if layers is None else parse_layers(layers),
        expert_tokens=parse_counts(expert_tokens, "--expert-tokens", 1, MAX_EXPERT_TOKENS),
        recipe=find_recipe(compress, group=lut_group, vector=vector, rank=recover_rank),
        groups=groups,
        calibrate=calibrate,
        budget_mb=budget_mb,
        min_cosine=min_cosine,
        ignore_tensors=tuple(ignore_tensors or ()),
        lengths=None if lengths is None else parse_counts(lengths, "--lengths", 1, MAX_LENGTH),
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
    asked = Asked(
        checkpoint=checkpoint,
        out=out,
        options=options,
        sizes=(experts_per_function, layers_per_shard),
        aim=aim,
        golden=golden,
        prompts=prompts,
        overwrite=overwrite,
        workers=workers,
        cluster=cluster,
    )
    way = planned(asked, dry_run)
    if dry_run:
        show_plan(way, as_json)
    else:
        show_report(way, carried_out(way), as_json)


def _place(out: Path, cluster: str | None) -> Path:
    """What is written: found from other folders where workers of a cluster are in them."""
    from ane_moe.addresses import from_anywhere, output_place

    return from_anywhere(output_place(out)) if cluster else output_place(out)


def _may_be_done(out: Path, overwrite: bool) -> bool:
    from ane_moe.manifest import FILE_NAME

    return (out / FILE_NAME).exists() and not overwrite


def _prepare(workers: int) -> None:
    """Let worker processes import what they need, while this one imports what it does."""
    from ane_moe.conversion.workers import prepare

    prepare(workers, STAMPING)


def _grouped(grouping: Path | None, asked: str | None) -> tuple[str | None, Groups]:
    """Experts of a function as asked for, and its groups by layer, where a file has some. Raises
    UserError where the two disagree."""
    if grouping is None:
        return asked, {}
    from ane_moe.routing.grouping import read_grouping

    groups = read_grouping(grouping)
    size = str(groups.experts_per_function)
    if asked not in (None, size):
        raise UserError(
            "--grouping and --experts-per-function disagree",
            f"{size} in {grouping}, {asked} given",
            "leave --experts-per-function out",
        )
    return size, groups.layers


def _divisor(text: str) -> int | None:
    if text in DIVISORS:
        return DIVISORS[text]
    if not text.isdecimal():
        raise UserError("--stream-scale is not possible", repr(text), "give auto, off or a number")
    return int(text)
