"""Measure a conversion: prove its output, then time its functions and its token loop."""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import psutil

from ane_moe.benchmark.beside import Beside, set_beside
from ane_moe.benchmark.energy import NotPermitted, measure_energy, require_powermetrics
from ane_moe.benchmark.function_timing import time_functions
from ane_moe.benchmark.loop_timing import (
    PREFILL_RUNS,
    default_fills,
    default_lengths,
    time_decode,
    time_prefill,
    time_windows,
)
from ane_moe.benchmark.output_check import AS_STORED, ORIGINAL, check_output, open_goldens
from ane_moe.benchmark.result import BenchReport, LoadTiming, Memory, Side, Versus
from ane_moe.benchmark.surroundings import surroundings, thermal_state
from ane_moe.benchmark.versus_mlx import run_mlx
from ane_moe.conversion.workers import peak_memory_bytes
from ane_moe.errors import UserError
from ane_moe.loop.labels import Labeller
from ane_moe.loop.prefetch import AUTO
from ane_moe.loop.session import Session
from ane_moe.loop.shards import LoadedShards, load_shards
from ane_moe.manifest import Manifest, read_manifest
from ane_moe.origins import shown
from ane_moe.progress import Progress, silent
from ane_moe.runtime import resolve_runtime
from ane_moe.verification.verify import MIN_LOGIT_COSINE, MIN_LOGIT_COSINE_COMPRESSED

DEFAULT_UNITS = "cpu_and_ne"


@dataclass(frozen=True)
class BenchOptions:
    """How to measure. `runs` warm calls of each function after `warmup`; `tokens` decoded at each
    context fill of `fills`; prompts of `lengths` tokens (None: chosen by the context). An encoder
    has `lengths` of its own, and no fills. `units` None: cpu_and_ne on Core ML. `adapter`: one that
    the conversion can switch on."""

    runs: int = 20
    warmup: int = 3
    tokens: int = 32
    fills: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    units: str | None = None
    adapter: str | None = None
    expert_cache_bytes: int | None = None
    memory_mb: float | None = None
    direct: bool = False
    concurrency: int = 1
    predictor: str = AUTO
    energy: bool = False
    vs_mlx: Path | None = None


def bench(
    out: Path,
    options: BenchOptions | None = None,
    *,
    runtime: str = "auto",
    min_logit_cosine: float | None = None,
    progress: Progress | None = None,
    **runtime_options: Any,
) -> BenchReport:
    """Time the conversion in `out` on this machine, unless its output is wrong: then the report
    holds no speed.

    `runtime_options` go to the runtime. Raises UserError when there is no whole conversion or no
    golden in it, and for options that do not fit it or this machine.
    """
    options = options or BenchOptions()
    report_progress = progress or silent
    manifest = read_manifest(out).with_adapter(options.adapter)
    _require_sensible(options, manifest)
    runtime = resolve_runtime(runtime, manifest.package_form)
    units = _units(options, runtime)
    goldens = open_goldens(out, manifest)
    text = list(chain.from_iterable(goldens[ORIGINAL].prompts))
    runtime_options |= {"units": units} if units else {}
    compiled = _compiled_before(out, manifest, runtime, runtime_options)
    conditions = replace(
        surroundings(manifest, runtime, units, options.warmup, compiled), adapter=options.adapter
    )
    report_progress("loading", 0, 1)
    model, load = _load(out, runtime, options, text[0], runtime_options)
    checks = check_output(model, goldens, _limits(min_logit_cosine, manifest), report_progress)
    report = BenchReport(
        all(check.passed for check in checks),
        shown(out),
        runtime,
        conditions,
        checks,
        synchronisations=manifest.synchronisations,
    )
    if not report.passed:
        return report
    report = replace(report, load=load)
    report = _timed(report, model, text, options, runtime_options, report_progress)
    beside = set_beside(report, out, options.concurrency)
    if isinstance(beside, Beside):
        return replace(report, predicted=beside.as_json())
    return replace(report, predicted_skipped=beside)


def _timed(
    report: BenchReport,
    model: Session | Labeller,
    text: list[int],
    options: BenchOptions,
    runtime_options: dict[str, Any],
    progress: Progress,
) -> BenchReport:
    """With the times of functions, and of the loop over texts or tokens; memory and the machine's
    state as they are after it."""
    shards = model.shards
    functions = time_functions(
        shards.folder,
        shards.manifest,
        shards.runtime,
        options.warmup,
        options.runs,
        progress,
        **runtime_options,
    )
    report = replace(report, functions=tuple(functions))
    if isinstance(model, Labeller):
        lengths = options.lengths or model.lengths
        windows = time_windows(model, text, lengths, options.runs, progress)
        report = replace(report, windows=tuple(windows))
    else:
        report = _with_loop(report, model, text, options, progress)
    conditions = replace(report.conditions, thermal=thermal_state())
    return replace(report, memory=_memory(shards), conditions=conditions)


def _with_loop(
    report: BenchReport,
    session: Session,
    text: list[int],
    options: BenchOptions,
    progress: Progress,
) -> BenchReport:
    """Decoding and prefill, and what else was asked for."""
    manifest = session.manifest
    fills = options.fills or default_fills(manifest, options.tokens, options.warmup)
    lengths = options.lengths or default_lengths(manifest)
    decode = time_decode(session, text, fills, options.tokens, options.warmup, progress)
    report = replace(report, decode=tuple(decode))
    prefill = time_prefill(session, text, lengths, PREFILL_RUNS, progress)
    report = replace(report, prefill=tuple(prefill))
    if options.energy:
        progress("energy", 0, 1)
        report = _with_energy(report, session, text)
    if options.vs_mlx:
        progress("mlx-lm", 0, 1)
        report = replace(report, versus=_versus(session, options, text, max(lengths)))
    return report


def _require_sensible(options: BenchOptions, manifest: Manifest) -> None:
    for name in ("runs", "tokens", "concurrency"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1", str(getattr(options, name)))
    if options.warmup < 0:
        raise UserError("--warmup must be 0 or more", str(options.warmup))
    if options.energy:
        require_powermetrics(shutil.which)
    if not manifest.lengths:
        return
    decoding = {
        "--fills": options.fills,
        "--energy": options.energy,
        "--vs": options.vs_mlx,
        "--predictor": options.predictor not in (AUTO, "none"),
    }
    if asked := [name for name, value in decoding.items() if value]:
        raise UserError(f"{asked[0]} is of decoding", "an encoder, which decodes nothing")
    if set(options.lengths or ()) - set(manifest.lengths):
        there = ", ".join(map(str, manifest.lengths))
        raise UserError("--lengths of an encoder are those of its functions", do=f"give {there}")


def _units(options: BenchOptions, runtime: str) -> str | None:
    if runtime == "coreml":
        return options.units or DEFAULT_UNITS
    if options.units is not None:
        raise UserError(
            "--units chooses among Core ML's compute units",
            f"the {runtime} runtime",
            "leave it out, or run on a Mac",
        )
    return None


def _compiled_before(
    out: Path, manifest: Manifest, runtime: str, options: dict[str, Any]
) -> tuple[int, int] | None:
    """How many packages, of all, need no compilation any more: what loading takes depends on little
    else."""
    if runtime != "coreml":
        return None
    from ane_moe.runtime.coreml.runtime import default_cache

    cache = options.get("cache") or default_cache()
    found = sum(cache.find(cache.key(out / shard.path)) is not None for shard in manifest.shards)
    return found, len(manifest.shards)


def _load(
    out: Path, runtime: str, options: BenchOptions, first: int, runtime_options: dict[str, Any]
) -> tuple[Session | Labeller, LoadTiming]:
    started = perf_counter()
    shards = load_shards(
        out,
        runtime,
        adapter=options.adapter,
        expert_cache_bytes=options.expert_cache_bytes,
        memory_mb=options.memory_mb,
        direct=options.direct,
        **runtime_options,
    )
    model: Session | Labeller
    if shards.manifest.lengths:
        model = Labeller(shards, concurrency=options.concurrency)
    else:
        model = Session(shards, concurrency=options.concurrency, predictor=options.predictor)
    loaded = perf_counter()
    model.logits([first]) if isinstance(model, Labeller) else model.decode(first)
    functions = sum(
        len(shard.functions) for shard in shards.manifest.shards if not shard.dispatched
    )
    return model, LoadTiming(loaded - started, perf_counter() - loaded, functions)


def _limits(asked: float | None, manifest: Manifest) -> dict[str, float]:
    """The cosine that logits have to reach, by golden: compression excuses nothing that the stored
    weights give."""
    usual = MIN_LOGIT_COSINE_COMPRESSED if manifest.compressed else MIN_LOGIT_COSINE
    return {ORIGINAL: usual if asked is None else asked, AS_STORED: MIN_LOGIT_COSINE}


def _memory(shards: LoadedShards) -> Memory:
    manifest = shards.manifest
    caches = sum(
        2 * math.prod(shape) for shard in manifest.shards for shape in shard.states.values()
    )
    now = psutil.Process().memory_info().rss
    return Memory(
        process_bytes=now,
        peak_bytes=max(now, peak_memory_bytes()),  # the two are counted apart
        weight_bytes=sum(shard.weight_bytes for shard in manifest.shards),
        kv_cache_bytes=caches,
        expert_cache_peak_bytes=shards.cache.figures.bytes_peak if shards.cache else None,
    )


def _with_energy(report: BenchReport, session: Session, text: Sequence[int]) -> BenchReport:
    """Energy, or why there is none."""
    identifier = text[0]
    session.reset()

    def decode_token() -> None:
        nonlocal identifier
        if not session.room:
            session.reset()
        identifier = int(np.argmax(session.decode(identifier)))

    try:
        return replace(report, energy=measure_energy(decode_token))
    except NotPermitted as refusal:
        return replace(
            report,
            energy_skipped=f"{refusal} (powermetrics needs root: run `sudo -v` before, or allow it "
            "in sudoers)",
        )


def _versus(session: Session, options: BenchOptions, text: Sequence[int], length: int) -> Versus:
    """Our loop and mlx-lm's on one prompt."""
    assert options.vs_mlx
    manifest = session.manifest
    length = min(length, manifest.context - options.tokens - 1)
    if length < 1:
        raise UserError(
            "the context leaves no room for a prompt",
            f"{manifest.context} tokens",
            "give fewer --tokens",
        )
    (prefill,) = time_prefill(session, text, [length], PREFILL_RUNS, silent)
    (decode,) = time_decode(session, text, [length], options.tokens, 1, silent)
    prompt = [text[index % len(text)] for index in range(length)]
    ours = Side(
        "ane-moe",
        manifest.weights,
        1000 * length / prefill.latency.median_ms,
        decode.tok_s,
        options.tokens,
        peak_memory_bytes(),
        PREFILL_RUNS,
    )
    return run_mlx(options.vs_mlx, manifest, ours, prompt)
