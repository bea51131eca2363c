"""`ane-moe inspect`: what a package holds."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ane_moe.commands.options import AsJson, Package
from ane_moe.origins import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from rich.console import RenderableType

    from ane_moe.mlprogram.program import Feature, Program
    from ane_moe.mlprogram.summary import FunctionSummary, PipelineSummary, Summary
    from ane_moe.placement.result import PlacementReport

VENDOR = "com.github.apple."  # of the metadata that coremltools writes


def inspect(
    package: Package,
    ops: Annotated[bool, typer.Option("--ops", help="Print the program too.")] = False,
    placement: Annotated[
        bool,
        typer.Option(
            "--placement",
            help="Predict where each operation would run; exits with 1 when a rule is broken.",
        ),
    ] = False,
    target: Annotated[
        str, typer.Option(help="Chip to predict for: m1 ... m5-max, iphone-a17 ...")
    ] = "m4-max",
    system: Annotated[int, typer.Option("--os", help="System to predict for: 15, 26 or 27.")] = 26,
    as_json: AsJson = False,
) -> None:
    """Show the functions, inputs, outputs, states, operations and weight formats of a package, or
    how experts lie in a store (experts/layer_NN.bin)."""
    from ane_moe.package_form import ASSET
    from ane_moe.report.store_table import SUFFIX

    if package.suffix == SUFFIX:
        _show_store(package, as_json)
    elif package.suffix == ASSET:
        _require_no("--ops" if ops else "--placement" if placement else None)
        _show_asset(package, as_json)
    else:
        found = _opened(package)
        report = _predicted(found.programs, package.name, target, system) if placement else None
        _show_model(found, ops, report, as_json)
        if report and not report.passed:
            raise typer.Exit(1)


@dataclass(frozen=True)
class Inspected:
    """A model of Core ML's: its programs, what they hold as JSON data, and as tables."""

    programs: "Sequence[Program]"
    document: "Callable[[], dict[str, Any]]"
    parts: "Callable[[], list[RenderableType]]"


def _opened(package: Path) -> Inspected:
    """A package or a pipeline of several, without the need of their weights."""
    from ane_moe.mlprogram.pipeline import OpenPipeline, open_model
    from ane_moe.mlprogram.summary import (
        pipeline_document,
        summarize,
        summarize_pipeline,
        summary_document,
    )

    model = open_model(package, require_weights=False)
    if isinstance(model, OpenPipeline):
        pipeline = summarize_pipeline(model)
        programs = [stage.program for stage in pipeline.stages if stage.program]
        document = partial(pipeline_document, pipeline)
        return Inspected(programs, document, partial(_pipeline_parts, pipeline))
    program = model.read()
    summary = summarize(program)
    return Inspected([program], partial(summary_document, summary), partial(_parts, summary))


def _require_no(option: str | None) -> None:
    """Raise UserError for what is not known of Core AI's assets."""
    if option:
        from ane_moe.errors import UserError

        raise UserError(
            "of an .aimodel neither operations nor placement are shown", option, "leave it out"
        )


def _show_store(file: Path, as_json: bool) -> None:
    from rich.console import Console

    from ane_moe.report.store_table import find_store, store_document, store_table

    shard = find_store(file)
    if as_json:
        typer.echo(json.dumps(store_document(shard), indent=2))
    else:
        Console().print(store_table(shard))


def _show_asset(package: Path, as_json: bool) -> None:
    from rich.console import Console

    from ane_moe.report.asset_table import asset_report
    from ane_moe.runtime.coreai.summary import summarize_asset

    asset = summarize_asset(package)
    if as_json:
        typer.echo(json.dumps(asset.as_json(), indent=2))
    else:
        Console().print(asset_report(asset))


def _show_model(
    found: Inspected, ops: bool, placement: "PlacementReport | None", as_json: bool
) -> None:
    from rich.console import Console
    from rich.text import Text

    from ane_moe.mlprogram.printer import program_text

    programs = found.programs if ops else ()
    lines = [line for program in programs for line in program_text(program)]
    if as_json:
        extra: dict[str, Any] = {"program": lines} if ops else {}
        extra |= {"placement": placement.as_json()} if placement else {}
        typer.echo(json.dumps(found.document() | extra, indent=2))
        return
    console = Console()
    for part in found.parts():
        console.print(part)
    for line in lines:
        console.print(Text(line), soft_wrap=True)
    if placement:
        from ane_moe.report.placement_table import placement_report

        console.print("", placement_report(placement))


def _predicted(
    programs: "Sequence[Program]", name: str, target: str, system: int
) -> "PlacementReport":
    from ane_moe.placement.predicted import predict
    from ane_moe.placement.targets import find_target

    return predict([(program, name) for program in programs], find_target(target, system))


def _pipeline_parts(summary: "PipelineSummary") -> "list[RenderableType]":
    notes = ["" if stage.summary else ", not executed here" for stage in summary.stages]
    kinds = [
        (f"stage {stage.index}", stage.kind + note)
        for stage, note in zip(summary.stages, notes, strict=True)
    ]
    facts = [
        ("package", shown(summary.path)),
        ("pipeline of", f"{len(kinds)} models"),
        *kinds,
        *((name.removeprefix(VENDOR), value) for name, value in summary.metadata.items()),
    ]
    features = [
        *(("input", feature) for feature in summary.inputs),
        *(("output", feature) for feature in summary.outputs),
    ]
    parts = [_table("", ("", ""), facts), _feature_table("the pipeline", features)]
    for stage in summary.stages:
        if stage.summary:
            parts += [_table(f"stage {stage.index}", ("", ""), []), *_parts(stage.summary)]
    return parts


def _parts(summary: "Summary") -> "list[RenderableType]":
    from ane_moe.mlprogram.printer import printable

    facts = [
        ("package", shown(summary.path)),
        ("needs", f"{summary.system} (specification version {summary.specification_version})"),
        ("default function", summary.default_function),
        (
            "weights",
            f"{summary.weight_bytes:,} bytes " + ("declared" if summary.absent else "stored"),
        ),
        *(("missing", problem) for problem in summary.absent),
        *((name.removeprefix(VENDOR), value) for name, value in summary.metadata.items()),
    ]
    formats = [
        (
            total.format,
            f"{total.weights:,}",
            f"{total.elements:,}",
            f"{total.stored_bytes:,}",
            f"{8 * total.stored_bytes / total.elements:.2f}" if total.elements else "",
        )
        for total in summary.formats
    ]
    return [
        _table("", ("", ""), [(name, printable(value)) for name, value in facts]),
        *(part for function in summary.functions for part in _function_parts(function)),
        _table(
            "weights by format",
            ("format", "weights", "elements", "stored bytes", "bits per element"),
            formats,
            1,
        ),
    ]


def _function_parts(function: "FunctionSummary") -> "list[RenderableType]":
    features = [
        *(("input", feature) for feature in function.interface.inputs),
        *(("state", feature) for feature in function.interface.states),
        *(("output", feature) for feature in function.interface.outputs),
    ]
    title = f"function {function.name} ({function.opset}, weights {function.weight_bytes:,} bytes)"
    counts = [(name, f"{count:,}") for name, count in function.operations.items()]
    return [_feature_table(title, features), _table("", ("operation", "count"), counts, 1)]


def _feature_table(title: str, features: "Sequence[tuple[str, Feature]]") -> "RenderableType":
    rows = [(role, feature.name, *_type(feature)) for role, feature in features]
    return _table(title, ("", "name", "type", "shape"), rows)


def _type(feature: "Feature") -> tuple[str, str]:
    from ane_moe.runtime.inputs import pixel_text

    shape = _by("?" if size is None else size for size in feature.type.shape) or "scalar"
    if feature.ranges:
        shape += " (" + _by(_range(*bounds) for bounds in feature.ranges) + ")"
    if feature.shapes:
        shape += " (one of " + ", ".join(map(_by, feature.shapes)) + ")"
    if feature.kind in ("array", "state"):
        kind = feature.type.dtype
    elif feature.layout:
        kind = f"image {feature.layout}{pixel_text(feature)}, {feature.type.dtype} inside"
    else:
        kind = f"{feature.kind} {feature.type.dtype}"
    default = "" if feature.default is None else f", {feature.default:g} where not given"
    return kind + (", optional" if feature.optional else "") + default, shape


def _by(sizes: "Iterable[object]") -> str:
    return " x ".join(map(str, sizes))


def _range(lower: int, upper: int) -> str:
    if lower == upper:
        return str(lower)
    return f"{lower}..{upper if upper >= 0 else ''}"


def _table(
    title: str,
    columns: tuple[str, ...],
    rows: "Sequence[tuple[str, ...]]",
    first_number: int | None = None,
) -> "RenderableType":
    """A table of plain text; columns from `first_number` on are aligned right."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from ane_moe.mlprogram.printer import printable

    table = Table(show_header=any(columns), box=None, pad_edge=False)
    for index, column in enumerate(columns):
        number = first_number is not None and index >= first_number
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return Group("", Text(printable(title), style="bold"), table) if title else Group("", table)
