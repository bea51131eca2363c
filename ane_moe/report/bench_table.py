"""A BenchReport for the terminal. Every table's title says which runtime its times are of."""

from collections.abc import Iterable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ane_moe.benchmark.result import BenchReport, Energy, LoopTiming, OutputCheck, Versus
from ane_moe.benchmark.saved import Comparison
from ane_moe.forecast.engine_speed import bearable_gap_ms
from ane_moe.model.spec import Synchronisations

MB = 1_000_000
KINDS = {
    "attn": "attention",
    "moe": "MoE",
    "experts": "experts",
    "join": "sums",
    "dense": "dense",
    "stack": "layers",
    "track": "tracks",
    "lm_head": "head",
    "labels": "head",
}


def bench_report(report: BenchReport, comparison: Comparison | None = None) -> RenderableType:
    """Conditions, then the tables; or, for wrong output, what is wrong and no time at all."""
    parts: list[RenderableType] = [*_conditions(report), *map(_check, report.checks)]
    if not report.passed:
        return Group(
            *parts,
            Text(
                "FAILED  the output is wrong, so its speed is not reported: run `ane-moe verify`",
                style="bold red",
            ),
        )
    parts.append(_functions(report))
    loops = (
        ("Decode; ms of a token, and where they go", report.decode, "context", "fill"),
        (
            "Prefill; ms of the prompt, and where they go for a token",
            report.prefill,
            "prompt",
            "tokens",
        ),
        (
            "Windows; ms of a window, and where they go for a token",
            report.windows,
            "window",
            "tokens",
        ),
    )
    parts += [_loop(report, title, rows, *count) for title, rows, *count in loops if rows]
    parts += [_gap(report.decode)] if report.is_device and report.decode else []
    parts += (
        [_synchronised(report.synchronisations, report.decode)] if report.synchronisations else []
    )
    parts += [*_totals(report), *(_energy(report.energy) if report.energy else [])]
    parts += (
        [Text(f"no energy: {report.energy_skipped}", style="yellow")]
        if report.energy_skipped
        else []
    )
    parts += [_versus(report.versus)] if report.versus else []
    parts += [_predicted(report.predicted)] if report.predicted else []
    if report.predicted_skipped and report.is_device:
        parts.append(Text(f"no prediction: {report.predicted_skipped}", style="dim"))
    parts += [_comparison(comparison)] if comparison else []
    return Group(*parts)


def _conditions(report: BenchReport) -> Iterable[Text]:
    one = report.conditions
    yield Text(one.label, style="bold" if report.is_device else "bold yellow")
    facts = [
        one.chip,
        one.os,
        one.units,
        f"{one.cores} cores",
        None if one.load_average is None else f"load {one.load_average:.1f}",
        one.power_source,
        "low power mode" if one.low_power_mode else None,
        one.thermal,
        f"{one.weights} weights",
        f"adapter {one.adapter}" if one.adapter else None,
        f"{one.routing} routing",
        f"context {one.context}",
        f"T={one.prefill_tokens} in prefill" if one.prefill_tokens else "no prefill functions",
        f"{one.tail_share:.1%} of a prompt's multiplications left out" if one.tail_share else None,
        f"{one.warmup} warm-up calls",
        one.compiled_before and "{} of {} packages compiled before".format(*one.compiled_before),
        one.started,
    ]
    yield Text(", ".join(filter(None, facts)))
    yield Text(", ".join(f"{name} {version}" for name, version in one.versions.items()))


def _check(check: OutputCheck) -> Text:
    model = check.model
    what = "label" if model.of_labels else "greedy token"
    text = (
        f"output, {model.function}, golden {check.golden}: {model.tokens} tokens, logit cosine "
        f"{model.logit_cosine:.6f} (at least {model.min_logit_cosine}), same {what} "
        f"{model.top1_agreement:.1%}, clearly wrong {check.wrong_tokens}"
    )
    return Text(text, style="green" if check.passed else "red")


def _functions(report: BenchReport) -> Table:
    runs = report.functions[0].latency.runs
    table = _table(
        report,
        f"Functions alone, the largest shard of each kind; ms, n={runs}",
        "kind",
        "function",
        "T",
        "shards",
        "load s",
        "first",
        "median",
        "p95",
        "min",
    )
    for row in report.functions:
        table.add_row(
            KINDS.get(row.kind, row.kind),
            row.function,
            str(row.tokens),
            str(row.shards),
            f"{row.load_seconds:.2f}",
            *map(
                _ms,
                (row.first_call_ms, row.latency.median_ms, row.latency.p95_ms, row.latency.min_ms),
            ),
        )
    return table


def _loop(
    report: BenchReport, title: str, rows: tuple[LoopTiming, ...], first: str, count: str
) -> Table:
    """`count` is the field that tells the rows apart, `first` the heading of it."""
    kinds = list(dict.fromkeys(kind for row in rows for kind in row.kinds_ms))
    waits = ["waiting"] if any(row.load_ms for row in rows) else []
    cached = ["hits"] if any(row.cache for row in rows) else []
    table = _table(
        report,
        f"{title}, n={rows[0].latency.runs}",
        first,
        "tok/s",
        "median",
        "p95",
        *(KINDS.get(kind, kind) for kind in kinds),
        *waits,
        "host",
        "calls",
        "gap",
        *cached,
    )
    for row in rows:
        parts = (
            [row.kinds_ms.get(kind, 0.0) for kind in kinds]
            + [row.load_ms] * len(waits)
            + [row.host_ms]
        )
        hits = f"{row.cache.hit_rate:.0%}" if row.cache else "-"
        table.add_row(
            str(getattr(row, count)),
            f"{row.tok_s:.1f}",
            _ms(row.latency.median_ms),
            _ms(row.latency.p95_ms),
            *map(_ms, parts),
            f"{row.calls_per_token:.2f}",
            _ms(row.gap_ms),
            *([hits] if cached else []),
        )
    return table


def _synchronised(planned: Synchronisations, rows: tuple[LoopTiming, ...]) -> Text:
    """Meetings of tracks in a step, counted beside planned."""
    counted = ", ".join(f"{count:g}" for count in {row.synchronisations_per_token for row in rows})
    return Text(f"{planned.sentence}; counted decoding: {counted}")


def _gap(rows: tuple[LoopTiming, ...]) -> Text:
    """The longest of the decode loop, beside what an engine was seen to bear."""
    longest, bearable = max(row.gap_ms for row in rows), bearable_gap_ms()
    found = f"gap on the host before a call, decoding: measured {_ms(longest)} ms"
    return Text(
        f"{found}; an M6's engine clocks down above {bearable} ms (docs/cost-model.md)",
        style="yellow" if longest > bearable else "",
    )


def _totals(report: BenchReport) -> Iterable[Text]:
    load, memory = report.load, report.memory
    if load:
        yield Text(
            f"loading {load.functions} functions {load.seconds:.2f} s, first token "
            f"{load.first_token_seconds:.2f} s after it"
        )
    if memory:
        experts = memory.expert_cache_peak_bytes
        yield Text(
            f"process {memory.process_bytes / MB:,.0f} MB, peak {memory.peak_bytes / MB:,.0f} MB "
            f"(what Core ML "
            f"holds outside the process is not in it); weights {memory.weight_bytes / MB:,.0f} MB "
            f"on disk, KV "
            f"cache {memory.kv_cache_bytes / MB:,.1f} MB"
            + ("" if experts is None else f", expert cache at most {experts / MB:,.1f} MB")
        )


def _energy(energy: Energy) -> Iterable[Text]:
    idle, busy = energy.idle, energy.decoding
    yield Text(
        f"energy: {energy.mj_per_token:.1f} mJ per token, {energy.mj_per_token_above_idle:.1f} "
        f"above idle, over "
        f"{energy.tokens} tokens; power CPU {busy.cpu_mw:.0f}, GPU {busy.gpu_mw:.0f}, Neural "
        f"Engine "
        f"{busy.ane_mw:.0f} mW decoding, {idle.cpu_mw:.0f}, {idle.gpu_mw:.0f}, {idle.ane_mw:.0f} "
        f"mW idle; "
        f"thermal pressure {busy.thermal_pressure or 'unknown'}"
    )
    yield Text(f"        {energy.limits}", style="dim")


def _versus(versus: Versus) -> Group:
    table = Table(
        title=f"The same prompt of {versus.prompt_tokens} tokens",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    for column in (
        "program",
        "weights",
        "prefill tok/s",
        "decode tok/s",
        "new tokens",
        "peak MB",
        "n",
    ):
        table.add_column(column, justify="left" if column in ("program", "weights") else "right")
    for side in (versus.ours, versus.theirs):
        table.add_row(
            side.name,
            side.weights,
            f"{side.prefill_tok_s:.1f}",
            f"{side.decode_tok_s:.1f}",
            str(side.new_tokens),
            f"{side.peak_bytes / MB:,.0f}",
            str(side.runs),
        )
    return Group(table, Text(versus.remark, style="dim"))


def _predicted(beside: dict[str, Any]) -> Group:
    table = Table(
        title=f"Predicted for {beside['chip']} beside measured (ratio: measured over expected)",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    for column in ("", "unit", "predicted low", "expected", "high", "measured", "ratio", "within"):
        table.add_column(column, justify="left" if column in ("", "unit") else "right")
    for row in beside["rows"]:
        ends = row["predicted"]
        table.add_row(
            row["what"],
            row["unit"],
            _ms(ends["low"]),
            _ms(ends["expected"]),
            _ms(ends["high"]),
            _ms(row["measured"]),
            f"{row['ratio']:.2f}",
            "yes" if row["within"] else "no",
        )
    return Group(table, Text(f"{beside['loop']} loop; {beside['note']}", style="dim"))


def _comparison(comparison: Comparison) -> Group:
    table = Table(
        title=f"Against {comparison.against} (above 1: faster now)",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    for column in ("", "unit", "then", "now", "ratio"):
        table.add_column(column, justify="left" if column in ("", "unit") else "right")
    for change in comparison.changes:
        table.add_row(
            change.what,
            change.unit,
            f"{change.before:.4g}",
            f"{change.now:.4g}",
            f"{change.ratio:.2f}",
        )
    lines = [
        Text(f"other conditions, {name}: {before} then, {now} now", style="yellow")
        for name, (before, now) in comparison.differing.items()
    ]
    return Group(table, *lines)


def _table(report: BenchReport, title: str, *columns: str) -> Table:
    label = "" if report.is_device else f"  [{report.runtime} runtime on a CPU, NOT A DEVICE]"
    table = Table(
        title=Text(title + label), title_justify="left", box=SIMPLE_HEAD, padding=(0, 0, 0, 0)
    )
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return table


def _ms(value: float) -> str:
    """Three digits of what is below 100."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
