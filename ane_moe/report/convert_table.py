"""Conversions on the terminal and as JSON: the plan, the progress bar, the result."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ane_moe.addresses import named
from ane_moe.conversion.pipeline import ConvertReport
from ane_moe.conversion.pipeline import Progress as Step
from ane_moe.conversion.plan import EMBED, MB, ConversionPlan, ShardPlan
from ane_moe.conversion.stream_scale import DividedStream
from ane_moe.forecast.concerns import Concern
from ane_moe.forecast.conversion_cost import conversion_memory_bytes
from ane_moe.forecast.objections import Objections
from ane_moe.original.ranges import STREAM_LIMIT, SUM_LIMIT
from ane_moe.placement.targets import Target
from ane_moe.wording import counted, listed


class ConvertBar:
    """A progress bar on stderr: shard, MB written, peak memory, time left.

    `warnings` are printed above it with the first step, when what was asked for has proved
    possible.
    """

    def __init__(self, warnings: Iterable[str] = ()):
        self._warnings = list(warnings)

    def __enter__(self) -> "ConvertBar":
        columns = (
            BarColumn(),
            TextColumn("{task.fields[sizes]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("tracing", total=None, sizes="")
        self._bar.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, step: Step) -> None:
        """Show one step."""
        while self._warnings:
            self._bar.console.print(
                self._warnings.pop(0), markup=False, highlight=False, soft_wrap=True
            )
        self._bar.update(
            self._task,
            description=step.label,
            total=step.total_bytes / MB,
            completed=step.written_bytes / MB,
            sizes=f"{step.written_bytes / MB:,.0f}/{step.total_bytes / MB:,.0f} MB, "
            f"peak memory {step.peak_memory_bytes / MB:,.0f} MB",
        )


def plan_document(plan: ConversionPlan, concerns: Iterable[Concern] = ()) -> dict[str, Any]:
    """The plan as JSON data, with the placement rules it would meet."""
    return {
        "family": plan.spec.family,
        "layers": list(plan.layers),
        "context": plan.context,
        "options": dataclasses.asdict(plan.options),
        "functions": [{"name": name, "tokens": tokens} for name, tokens in plan.functions],
        "shards": [
            {
                "path": shard.path,
                "kind": shard.kind,
                "layer": shard.layer,
                "weight_bytes": shard.weight_bytes,
                "part": shard.part,
                "parts": shard.parts,
                "experts": list(shard.experts),
                "rows": shard.rows,
                "reason": shard.reason,
            }
            for shard in plan.shards
        ],
        "templates": len({graph for shard in plan.shards for graph in shard.graphs.values()}),
        "embed_bytes": plan.embed_bytes,
        "notes": list(plan.source.notes),
        "left_out": {why: list(names) for why, names in plan.source.left_out.items()},
        "disk_bytes": plan.disk_bytes,
        "memory_bytes_estimated": conversion_memory_bytes(plan),
        "synchronisations": plan.synchronisations and plan.synchronisations.as_json(),
        "concerns": [dataclasses.asdict(concern) for concern in concerns],
    }


def print_plan(plan: ConversionPlan) -> None:
    """The plan as a table on stdout: shards of a kind that differ only in their layer share a
    row."""
    functions = ", ".join(f"{name} (T={tokens})" for name, tokens in plan.functions)
    table = Table("shards", "count", "MB each", "MB", "why", box=None)
    for (path, size, reason), count in _rows(plan.shards).items():
        table.add_row(path, str(count), f"{size / MB:,.1f}", f"{count * size / MB:,.0f}", reason)
    if size := plan.embed_bytes:
        table.add_row(EMBED, "1", f"{size / MB:,.1f}", f"{size / MB:,.0f}", "")
    console = Console()
    console.print(
        f"{plan.spec.family}, {len(plan.layers)} of {len(plan.spec.layers)} layers, "
        f"context {plan.context}, functions {functions}"
    )
    console.print(table)
    console.print(
        f"disk {plan.disk_bytes / MB:,.0f} MB; memory about "
        f"{conversion_memory_bytes(plan) / MB:,.0f} MB "
        "over all processes (estimated)"
    )
    if plan.synchronisations:
        console.print(plan.synchronisations.sentence)
    _print_source(console, plan.source.notes, plan.source.left_out)


def report_document(report: ConvertReport, concerns: Iterable[Concern] = ()) -> dict[str, Any]:
    """The result as JSON data, with the placement rules it would meet."""
    return {
        "folder": named(report.folder),
        "written": list(report.written),
        "reused": list(report.reused),
        "weight_bytes": sum(shard.weight_bytes for shard in report.manifest.shards),
        "peak_memory_bytes": report.peak_memory_bytes,
        "golden": report.manifest.golden,
        "golden_kept": report.golden_kept,
        "stream": dataclasses.asdict(report.stream),
        "notes": list(report.notes),
        "left_out": {why: list(names) for why, names in report.manifest.left_out.items()},
        "concerns": [dataclasses.asdict(concern) for concern in concerns],
    }


def print_report(report: ConvertReport, checkpoint: str) -> None:
    """The result in two lines, and the next command, with the name that was given of the
    checkpoint."""
    size = sum(shard.weight_bytes for shard in report.manifest.shards) / MB
    console = Console()
    console.print(
        f"{len(report.manifest.shards)} shards, {size:,.0f} MB of weights in "
        f"{named(report.folder)}: {len(report.written)} written, {len(report.reused)} reused; "
        f"peak memory {report.peak_memory_bytes / MB:,.0f} MB",
        soft_wrap=True,
    )
    if report.golden_kept:
        console.print("goldens kept: an earlier run captured them of the same weights and prompts")
    if line := stream_line(report.stream):
        console.print(line, markup=False, soft_wrap=True)
    _print_source(console, report.notes, report.manifest.left_out)
    with_golden = "" if report.manifest.golden else f" --checkpoint {checkpoint}"
    console.print(
        f"next: ane-moe verify {named(report.folder)}{with_golden}", markup=False, soft_wrap=True
    )


def stream_line(stream: DividedStream) -> str:
    """What became of hidden states that are large; empty where nothing did."""
    parts = [*_of_the_stream(stream), *_of_layers(stream)]
    if not parts:
        return ""
    lost = f"{stream.rounded:,} of {counted(stream.weights, 'weight')} lost digits"
    return "; ".join((*parts, lost if stream.rounded else "no weight lost a digit"))


def _of_the_stream(stream: DividedStream) -> Iterator[str]:
    if stream.divisor == 1:
        return
    line = f"hidden states divided by {stream.divisor}"
    if widest := stream.widest:
        line += (
            f": in layer {widest.layer} they reach {widest.stream:,.0f} (fp16 ends at "
            f"{STREAM_LIMIT:,.0f}), and sums that are added to them {widest.sums:,.0f} (the "
            f"engine's at {SUM_LIMIT:,.0f})"
        )
    yield line


def _of_layers(stream: DividedStream) -> Iterator[str]:
    for layer, scale in stream.inner.items():
        found = [one for one in stream.ranges if one.layer == layer]
        values, ups, hidden = (
            max(getattr(one, name) for one in found) for name in ("values", "ups", "hidden")
        )
        if scale.values != 1:
            yield (
                f"values of layer {layer} divided by {1 / scale.values:.0f}: their sums reach "
                f"{values:,.0f}"
            )
        if scale.ups != 1:
            yield (
                f"up of layer {layer} divided by {1 / scale.ups:.0f}: its sums reach {ups:,.0f}, "
                f"and what enters down {hidden:,.0f}"
            )


def warnings(objections: Objections, target: Target) -> list[str]:
    """What speaks against the packages, as lines on stderr."""
    met = (_warning(concern, target) for concern in objections.concerns)
    return [*met, *objections.faults]


def _warning(concern: Concern, target: Target) -> str:
    where = f"{concern.kind} on {target.name} under OS {target.os}"
    return f"ane-moe: warning: {concern.state}: {where}: {concern.sentence}"


def _print_source(
    console: Console, notes: Sequence[str], left_out: Mapping[str, Sequence[str]]
) -> None:
    """What there is to say of how the checkpoint was read, a line each."""
    for note in notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    for why, names in left_out.items():
        console.print(
            f"left out: {counted(len(names), 'tensor')} of the checkpoint, {why}: {listed(names)}",
            markup=False,
            soft_wrap=True,
        )


def _rows(shards: tuple[ShardPlan, ...]) -> Counter[tuple[str, int, str]]:
    names = (
        shard.path if shard.layer is None else shard.path.replace(f"{shard.layer:02d}", "NN")
        for shard in shards
    )
    return Counter((name, s.weight_bytes, s.reason) for name, s in zip(names, shards, strict=True))
