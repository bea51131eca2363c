"""`ane-moe bench`: time a conversion whose output is right."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

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


def bench(
    out: Out,
    runs: Annotated[int, typer.Option(help="Warm calls of each function that count.")] = 20,
    warmup: Annotated[int, typer.Option(help="Calls before them.")] = 3,
    tokens: Annotated[int, typer.Option(help="Tokens decoded at each context fill.")] = 32,
    fills: Annotated[
        str | None,
        typer.Option(
            help="Tokens in the context before decoding.",
            metavar="LIST",
            show_default="none, a quarter, half, and full but for the tokens decoded",
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Prompt lengths to prefill.",
            metavar="LIST",
            show_default="1, 4 and 16 prefill calls",
        ),
    ] = None,
    runtime: RuntimeName = "auto",
    units: Annotated[
        Literal["cpu_and_ne", "cpu_only", "all"] | None,
        typer.Option(help="Core ML's compute units.", show_default="cpu_and_ne"),
    ] = None,
    min_logit_cosine: Annotated[
        float | None,
        typer.Option(
            help="Mean cosine the logits must reach, or no speed is reported.",
            show_default="0.99 for fp16 weights, 0.9 compressed",
        ),
    ] = None,
    adapter: AdapterName = None,
    expert_cache_mb: ExpertCacheMb = None,
    memory_mb: MemoryMb = None,
    direct: Direct = False,
    concurrency: Concurrency = 1,
    predictor: Predictor = "auto",
    energy: Annotated[
        bool,
        typer.Option(
            "--energy",
            help="macOS: energy per token, by powermetrics (needs root: run `sudo -v` before).",
        ),
    ] = False,
    vs: Annotated[
        Literal["mlx"] | None,
        typer.Option(help="Run the same prompt through mlx-lm, if it is installed."),
    ] = None,
    vs_model: Annotated[
        Path | None,
        typer.Option(help="For --vs: the checkpoint, or its mlx conversion.", metavar="FOLDER"),
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Write the report here, as JSON.", metavar="FILE")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="Compare with a saved report.", metavar="FILE")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Also write the figures as a page (see `report`).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time the shards in OUT: every kind of function, decoding, prefill.

    The same run first checks the output against the golden; when it is wrong, no speed is reported
    and the exit code is 1. Off macOS the reference runtime is timed, and labelled: that says
    nothing of a Neural Engine.
    """
    from rich.console import Console

    from ane_moe.benchmark.measurement import BenchOptions
    from ane_moe.benchmark.measurement import bench as measure
    from ane_moe.benchmark.saved import compare, read_saved, save_report
    from ane_moe.report.bench_table import bench_report
    from ane_moe.report.step_bar import step_bar

    if (vs is None) != (vs_model is None):
        raise UserError(
            "--vs and --vs-model belong together",
            f"{'--vs-model' if vs is None else '--vs'} alone",
            "give --vs mlx --vs-model FOLDER",
        )
    earlier = read_saved(against) if against else None
    from ane_moe.number_lists import parse_counts

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
        from ane_moe.files import write_named_by_user
        from ane_moe.report.html import render_html
        from ane_moe.report.report_data import gather

        write_named_by_user(html, render_html(replace(gather(out), bench=report.as_json())))
    if as_json:
        typer.echo(
            json.dumps(
                report.as_json() | {"against": comparison and comparison.as_json()}, indent=2
            )
        )
    else:
        Console().print(bench_report(report, comparison), soft_wrap=True)
    if not report.passed:
        raise typer.Exit(1)
