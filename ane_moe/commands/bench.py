"""`ane-moe bench`: time a conversion whose output is right."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ane_moe.commands.options import (
    AdapterName,
    AsJson,
    Concurrency,
    Direct,
    ExpertCacheMb,
    MemoryMb,
    Out,
    Predictor,
    RuntimeName,
)
from ane_moe.errors import UserError

if TYPE_CHECKING:
    from ane_moe.benchmark.result import BenchReport
    from ane_moe.benchmark.saved import Comparison


# What is timed.
Runs = Annotated[int, typer.Option(help="Warm calls of each function that count.")]
Warmup = Annotated[int, typer.Option(help="Calls before them.")]
Tokens = Annotated[int, typer.Option(help="Tokens decoded at each context fill.")]
Fills = Annotated[
    str | None,
    typer.Option(
        help="Tokens in the context before decoding.",
        metavar="LIST",
        show_default="none, a quarter, half, and full but for the tokens decoded",
    ),
]
Lengths = Annotated[
    str | None,
    typer.Option(
        help="Prompt lengths to prefill.",
        metavar="LIST",
        show_default="1, 4 and 16 prefill calls",
    ),
]
Units = Annotated[
    Literal["cpu_and_ne", "cpu_only", "all"] | None,
    typer.Option(help="Core ML's compute units.", show_default="cpu_and_ne"),
]
Energy = Annotated[
    bool,
    typer.Option(
        "--energy",
        help="macOS: energy per token, by powermetrics (needs root: run `sudo -v` before).",
    ),
]

# What it is held against.
MinLogitCosine = Annotated[
    float | None,
    typer.Option(
        help="Mean cosine the logits must reach, or no speed is reported.",
        show_default="0.99 for fp16 weights, 0.9 compressed",
    ),
]
Vs = Annotated[
    Literal["mlx"] | None,
    typer.Option(help="Run the same prompt through mlx-lm, if it is installed."),
]
VsModel = Annotated[
    Path | None,
    typer.Option(help="For --vs: the checkpoint, or its mlx conversion.", metavar="FOLDER"),
]
Against = Annotated[Path | None, typer.Option(help="Compare with a saved report.", metavar="FILE")]

# Where figures go.
Save = Annotated[Path | None, typer.Option(help="Write the report here, as JSON.", metavar="FILE")]
Html = Annotated[Path | None, typer.Option(help="Also write the figures as a page (see `report`).")]


def bench(
    out: Out,
    runs: Runs = 20,
    warmup: Warmup = 3,
    tokens: Tokens = 32,
    fills: Fills = None,
    lengths: Lengths = None,
    runtime: RuntimeName = "auto",
    units: Units = None,
    min_logit_cosine: MinLogitCosine = None,
    adapter: AdapterName = None,
    expert_cache_mb: ExpertCacheMb = None,
    memory_mb: MemoryMb = None,
    direct: Direct = False,
    concurrency: Concurrency = 1,
    predictor: Predictor = "auto",
    energy: Energy = False,
    vs: Vs = None,
    vs_model: VsModel = None,
    save: Save = None,
    against: Against = None,
    html: Html = None,
    as_json: AsJson = False,
) -> None:
    """Time the shards in OUT: every kind of function, decoding, prefill.

    The same run first checks the output against the golden; when it is wrong, no speed is reported
    and the exit code is 1. Off macOS the reference runtime is timed, and labelled: that says
    nothing of a Neural Engine.
    """
    from ane_moe.benchmark.measurement import BenchOptions
    from ane_moe.benchmark.measurement import bench as measure
    from ane_moe.benchmark.saved import compare, read_saved, save_report
    from ane_moe.number_lists import parse_counts
    from ane_moe.report.step_bar import step_bar

    _require_both(vs, vs_model)
    earlier = read_saved(against) if against else None
    options = BenchOptions(
        runs=runs,
        warmup=warmup,
        tokens=tokens,
        fills=None if fills is None else parse_counts(fills, "--fills", 0),
        lengths=None if lengths is None else parse_counts(lengths, "--lengths", 1),
        units=units,
        adapter=adapter,
        expert_cache_bytes=None if expert_cache_mb is None else int(expert_cache_mb * 1_000_000),
        memory_mb=memory_mb,
        direct=direct,
        concurrency=concurrency,
        predictor=predictor,
        energy=energy,
        vs_mlx=vs_model,
    )
    with step_bar() as progress:
        report = measure(
            out, options, runtime=runtime, min_logit_cosine=min_logit_cosine, progress=progress
        )
    comparison = compare(report, earlier, str(against)) if earlier and report.passed else None
    if save and report.passed:
        save_report(report, save)
    if html and report.passed:
        _write_page(html, out, report)
    _show(report, comparison, as_json)
    if not report.passed:
        raise typer.Exit(1)


def _require_both(vs: str | None, model: Path | None) -> None:
    if (vs is None) != (model is None):
        raise UserError(
            "--vs and --vs-model belong together",
            f"{'--vs-model' if vs is None else '--vs'} alone",
            "give --vs mlx --vs-model FOLDER",
        )


def _write_page(page: Path, out: Path, report: "BenchReport") -> None:
    from ane_moe.files import write_named_by_user
    from ane_moe.report.html import render_html
    from ane_moe.report.report_data import gather

    write_named_by_user(page, render_html(replace(gather(out), bench=report.as_json())))


def _show(report: "BenchReport", comparison: "Comparison | None", as_json: bool) -> None:
    if as_json:
        document = report.as_json() | {"against": comparison and comparison.as_json()}
        typer.echo(json.dumps(document, indent=2))
        return
    from rich.console import Console

    from ane_moe.report.bench_table import bench_report

    Console().print(bench_report(report, comparison), soft_wrap=True)
