"""The report as one self-contained HTML page: no network, no scripts."""

import re
from itertools import pairwise
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ane_moe.manifest import Manifest
from ane_moe.placement.result import FunctionPlacement
from ane_moe.report import plots
from ane_moe.report.report_data import ReportData
from ane_moe.report.verify_table import tokenizer_line
from ane_moe.verification.result import ShardResult

STRIP = 60  # cells of a placement strip
SHOWN_FINDINGS = 8
SHOWN_FAILURES = 20
ALIKE = re.compile(r"\d+")


def render_html(data: ReportData) -> str:
    """The page. Everything that comes from a manifest or a file is escaped."""
    environment = Environment(
        loader=PackageLoader("ane_moe.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    manifest = data.manifest
    return environment.get_template("page.html").render(
        data=data,
        manifest=manifest,
        verify=data.verify,
        headline=_headline(data),
        shards=_shards(data),
        total_mb=sum(shard.weight_bytes for shard in manifest.shards) / 1e6,
        parity=_parity(data),
        failures=_failures(data)[:SHOWN_FAILURES],
        placement=_placement(data),
        findings=_findings(data),
        svg=_plots(data),
        settings=_settings(data),
        on_cpu=sum(function.verdict == "cpu" for function in data.placement.functions)
        if data.placement
        else 0,
    )


def _headline(data: ReportData) -> str:
    manifest = data.manifest
    layers = f"{len(manifest.layers)} of {manifest.n_layers} layers"
    return f"{manifest.family}, {layers}, {manifest.routing} routing, {manifest.weights} weights"


def _shards(data: ReportData) -> list[dict[str, Any]]:
    """Shards by kind: how many, functions, MB."""
    rows: dict[str, dict[str, Any]] = {}
    for shard in data.manifest.shards:
        row = rows.setdefault(
            shard.kind, {"kind": shard.kind, "shards": 0, "functions": 0, "mb": 0.0, "largest": 0.0}
        )
        row["shards"] += 1
        row["functions"] += len(shard.functions)
        row["mb"] += shard.weight_bytes / 1e6
        row["largest"] = max(row["largest"], shard.weight_bytes / 1e6)
    return list(rows.values())


def _parity(data: ReportData) -> list[dict[str, Any]]:
    """The worst function of every kind against each golden."""
    if data.verify is None:
        return []
    sets = [("the original model", data.verify.shards)]
    if data.verify.as_stored:
        sets.append(("the weights as stored", data.verify.as_stored.shards))
    rows = []
    for against, results in sets:
        groups: dict[str, list[ShardResult]] = {}
        for result in results:
            groups.setdefault(result.kind, []).append(result)
        for kind, group in groups.items():
            worst = min(group, key=lambda row: row.cosine if row.cosine is not None else -2)
            rows.append(
                {
                    "against": against,
                    "kind": kind,
                    "worst": worst,
                    "of": len(group),
                    "passed": sum(row.passed for row in group),
                }
            )
    return rows


def _failures(data: ReportData) -> list[str]:
    if data.verify is None:
        return []
    lines = [f"{problem.path}: {problem.what}" for problem in data.verify.integrity]
    lines += [
        f"{row.path} {row.function}: {row.reason}" for row in data.verify.shards if not row.passed
    ]
    if data.verify.tokenizer and data.verify.tokenizer.reason:
        lines.append(f"tokenizer: {data.verify.tokenizer.reason}")
    stored = data.verify.as_stored.shards if data.verify.as_stored else ()
    return lines + [
        f"{row.path} {row.function}, against the weights as stored: {row.reason}"
        for row in stored
        if not row.passed
    ]


def _placement(data: ReportData) -> list[dict[str, Any]]:
    """A line for all functions that differ in numbers of layers and parts only, with the strip of
    the first."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for function in data.placement.functions if data.placement else ():
        key = (
            ALIKE.sub("N", function.path),
            ALIKE.sub("N", function.function),
            tuple(op.verdict for op in function.ops),
        )
        row = rows.setdefault(key, {"function": function, "alike": 0, "cells": _cells(function)})
        row["alike"] += 1
    return list(rows.values())


def _cells(function: FunctionPlacement) -> list[str]:
    """The worst verdict in each of at most STRIP stretches of operations."""
    verdicts = [op.verdict for op in function.ops]
    order = ("cpu", "gpu", "uncertain", "ane")
    count = min(STRIP, len(verdicts))
    bounds = [len(verdicts) * place // count for place in range(count + 1)] if count else [0]
    return [min(verdicts[a:b], key=order.index) for a, b in pairwise(bounds)]


def _findings(data: ReportData) -> list[dict[str, Any]]:
    """Findings by rule: the first, and how often."""
    rows: dict[str, dict[str, Any]] = {}
    for function in data.placement.functions if data.placement else ():
        where = f"{function.path} {function.function}"
        for finding in function.findings:
            row = rows.setdefault(finding.rule, {"finding": finding, "times": 0, "where": where})
            row["times"] += 1
    return list(rows.values())[:SHOWN_FINDINGS]


def _plots(data: ReportData) -> dict[str, Markup]:
    found: dict[str, str] = {}
    if data.verify and any(
        row.layer is not None and row.cosine is not None for row in data.verify.shards
    ):
        found["parity"] = plots.parity_plot(data.verify.shards, "against the original model")
    if data.routing:
        found["routing"] = plots.routing_plot(data.routing)
    if data.bench and data.bench["decode"]:
        found["latency"] = plots.latency_plot(data.bench["decode"])
    if data.predicted:
        found["prediction"] = plots.prediction_plot(data.predicted["decode"]["parts"])
    if data.manifest.compression:
        found["bytes"] = plots.bytes_plot(data.manifest.compression)
    # Matplotlib escapes the text it draws.
    return {name: Markup(svg) for name, svg in found.items()}


def _calls(manifest: Manifest) -> dict[str, str]:
    """How many tokens calls take."""
    if manifest.lengths:
        return {"tokens of a call": ", ".join(map(str, manifest.lengths))}
    return {"context": str(manifest.context), "tokens of a prefill call": str(manifest.prefill)}


def _settings(data: ReportData) -> dict[str, str]:
    manifest = data.manifest
    facts = {
        "family": manifest.family,
        "routing": manifest.routing,
        "weights": manifest.weights,
        "state": manifest.state,
        "layout": manifest.layout,
        **_calls(manifest),
    }
    if data.verify:
        facts |= {
            "verified on": f"{data.verify.runtime} runtime",
            "golden": f"{data.verify.golden_tokens} tokens",
        }
        facts["tokenizer"] = tokenizer_line(data.verify)
    if data.placement:
        facts["placement"] = (
            f"{data.placement.source} for {data.placement.target}, OS {data.placement.os}"
        )
    return facts | {
        f"version of {name}": number for name, number in sorted(manifest.versions.items())
    }
