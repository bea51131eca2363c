"""A VerifyReport for the terminal: worst case per kind of function, every failure by name."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ane_moe.report.engine_table import engine_tables, engine_title, overflow_lines
from ane_moe.report.failure_lines import failure_lines
from ane_moe.report.range_table import range_tables
from ane_moe.verification.result import (
    FunctionModelResult,
    RoutingResult,
    Sample,
    ShardResult,
    VerifyReport,
)

SHOWN_LAYERS = 8
CAUSES = {
    "compression": "; the shards compute what their weights say: the loss is the compression's",
    "engine": "; with exact sums the same shards pass: the loss is predicted of the engine",
    "tokenizer": "; the shards are right: prompts become other ids than the checkpoint's",
    "unknown": "; --checkpoint tells whether conversion or compression is to blame",
}


def verify_report(report: VerifyReport) -> RenderableType:
    """Problems with files, or the tables of functions, routing and the whole model; the verdict
    last."""
    parts: list[RenderableType] = [engine_title(report.engine)] if report.engine else []
    if report.compression:
        parts.append(_compression(report.compression))
    if report.as_stored:
        parts.append(
            functions_table(
                report.as_stored.shards, "Functions against the weights as stored: conversion alone"
            )
        )
    if report.shards:
        parts.append(
            functions_table(
                report.shards, "Functions, teacher-forced: the worst shard of each kind"
            )
        )
    if report.routing:
        parts.append(_routing(report.routing, report.routing_mode))
    if report.models:
        parts += [_models(report.models), *_divergences(report.models)]
    if report.engine:
        parts += engine_tables(report.engine)
    if report.ranges:
        parts += range_tables(report)
    if report.model_skipped:
        parts.append(Text(f"whole model not run: {report.model_skipped}"))
    if (line := tokenizer_line(report)) and (report.tokenizer is None or report.tokenizer.passed):
        parts.append(Text(f"tokenizer: {line}"))
    if report.sample:
        parts.append(Text(_looked_at(report.sample)))
    if report.reused_steps:
        parts.append(
            Text(f"{report.reused_steps} steps were proved by a run that was broken off (--fresh)")
        )
    parts += [*_failures(report), _verdict(report)]
    return Group(*parts)


def _compression(roles: Mapping[str, Mapping[str, Any]]) -> Table:
    table = _table(
        "Weights by role; the error is of the weights, relative L2",
        "role",
        "format",
        "MB",
        "bits",
        "error",
        "without directions apart",
    )
    for role, facts in sorted(roles.items()):
        size, bits = f"{facts['bytes'] / 1e6:.1f}", f"{facts['bits_per_weight']:.2f}"
        table.add_row(
            role,
            ", ".join(facts["formats"]),
            size,
            bits,
            _small(facts.get("relative_error")),
            _small(facts.get("relative_error_without_directions")),
        )
    return table


def functions_table(rows: tuple[ShardResult, ...], title: str) -> Table:
    """The worst of each kind of function."""
    table = _table(
        title, "kind", "function", "passed", "cosine", "margin", "rel. L2", "margin", "max error"
    )
    groups: dict[tuple[str, str], list[ShardResult]] = {}
    for row in rows:
        groups.setdefault((row.kind, re.sub(r"_\d+_", "_NNN_", row.function)), []).append(row)
    for (kind, function), group in groups.items():
        worst = min(group, key=_tightness)
        passed = sum(row.passed for row in group)
        table.add_row(
            kind,
            function,
            f"{passed}/{len(group)}",
            _figure(worst.cosine),
            _signed(worst.margin),
            _small(worst.relative_l2),
            _signed(worst.relative_l2_margin),
            _small(worst.max_abs_error),
            style=None if passed == len(group) else "red",
        )
    return table


def _tightness(row: ShardResult) -> float:
    """Least of the two margins, each as a share of what its gate allows."""
    if row.margin is None or row.relative_l2_margin is None:
        return float("-inf")
    return min(
        row.margin / max(1 - row.min_cosine, 1e-9),
        row.relative_l2_margin / max(row.max_relative_l2, 1e-9),
    )


def _routing(rows: tuple[RoutingResult, ...], mode: str) -> Table:
    table = _table(
        f"Routing ({mode}), tokens with the model's experts and probability outside its top k: the "
        f"{min(SHOWN_LAYERS, len(rows))} worst of {len(rows)} layers",
        "layer",
        "same experts",
        "near-tie flips",
        "model's outside",
        "shard's outside",
    )
    worst = sorted(rows, key=lambda row: row.set_agreement)[:SHOWN_LAYERS]
    for row in sorted(worst, key=lambda row: row.layer):
        table.add_row(
            str(row.layer),
            f"{row.set_agreement:.2%}",
            str(row.near_tie_flips),
            f"{row.mass_outside_top_k:.2%}",
            f"{row.gate_mass_outside_top_k:.2%}",
        )
    return table


def _models(rows: tuple[FunctionModelResult, ...]) -> Table:
    of_labels = rows[0].of_labels
    table = _table(
        "Whole model (KL in nats)"
        if of_labels
        else "Whole model, teacher-forced (KL in nats, perplexity golden / shards)",
        "function",
        "tokens",
        "same label" if of_labels else "top-1",
        "mean KL",
        *(("same spans",) if of_labels else ("golden", "shards")),
        "logit cosine",
        "margin",
    )
    for row in rows:
        perplexities = (_plain(row.perplexity_golden), _plain(row.perplexity_shards))
        table.add_row(
            row.function,
            str(row.tokens),
            f"{row.top1_agreement:.2%}",
            _small(row.mean_kl),
            *((span_figure(row),) if of_labels else perplexities),
            _figure(row.logit_cosine),
            _signed(row.logit_cosine - row.min_logit_cosine),
            style=None if row.passed else "red",
        )
    return table


def span_figure(row: FunctionModelResult) -> str:
    """How far the spans agree, of a token classifier."""
    return "none" if row.span_agreement is None else f"{row.span_agreement:.2%}"


def _divergences(rows: tuple[FunctionModelResult, ...]) -> Iterable[Text]:
    for row in rows:
        if first := row.first_differing_greedy_token:
            what = "label" if row.of_labels else "greedy token"
            yield Text(
                f"first other {what}, {row.function}: prompt {first.prompt}, position "
                f"{first.position}; "
                f"the golden prefers its own by {first.golden_margin:.2g} logits"
            )


def tokenizer_line(report: VerifyReport) -> str:
    """How the conversion's tokenizer compares with the checkpoint's; empty when nothing was run."""
    if report.tokenizer is None:
        return f"not compared: {report.tokenizer_skipped}" if report.tokenizer_skipped else ""
    all_alike = f"the checkpoint's ids for all of {report.tokenizer.texts} texts"
    return report.tokenizer.reason or all_alike


def _looked_at(sample: Sample) -> str:
    layers = ", ".join(map(str, sample.layers))
    text = (
        f"quick look: layers {layers} of {sample.of_layers}, {len(sample.packages)} of "
        f"{sample.of_packages} packages, {sample.prompts} of {sample.of_prompts} prompts; "
        "of expert functions the first, middle and last of a layer; "
        "the files of other packages are there, and were not read"
    )
    skipped = "; each layer was fed what the one before it in this list gave"
    return text + skipped if sample.layers_skipped else text


def _failures(report: VerifyReport) -> Iterable[Text]:
    lines = [f"{problem.path}: {problem.what}" for problem in report.integrity]
    lines += overflow_lines(report.engine) if report.engine else []
    if report.as_stored:
        lines += [
            f"{row.path} {row.function}, against the weights as stored: {row.reason}"
            for row in report.as_stored.shards
            if not row.passed
        ]
        lines += [
            f"whole model, {row.function}, against the weights as stored: logit cosine "
            f"{row.logit_cosine:.6f} is "
            f"below {row.min_logit_cosine}"
            for row in report.as_stored.models
            if not row.passed
        ]
    lines += [f"{row.path} {row.function}: {row.reason}" for row in report.shards if not row.passed]
    lines += [
        f"whole model, {row.function}: logit cosine {row.logit_cosine:.6f} is below "
        f"{row.min_logit_cosine}"
        for row in report.models
        if not row.passed
    ]
    if report.tokenizer and report.tokenizer.reason:
        lines.append(f"tokenizer: {report.tokenizer.reason}")
    yield from failure_lines(lines)


def _verdict(report: VerifyReport) -> Text:
    conditions = (
        f"{report.folder}: {report.weights} weights, {report.routing_mode} routing, "
        f"{report.runtime} runtime{', predicted arithmetic of the engine' if report.engine else ''}"
    )
    if report.passed:
        passed = "passed what a quick look sees " if report.sample else "passed "
        return Text(f"{passed} {conditions}, {report.golden_tokens} tokens", style="green")
    what = (
        "files are damaged, nothing was run"
        if report.integrity
        else f"{report.failures} gates failed"
    )
    what += CAUSES.get(report.cause or "", "")
    return Text(f"FAILED  {conditions}: {what}", style="bold red")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.6f}"


def _small(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.6f}"


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
