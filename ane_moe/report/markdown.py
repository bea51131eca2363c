"""The report as Markdown, for a model card: a badge-like first line, then the tables."""

from collections.abc import Iterable, Sequence
from typing import Any

from ane_moe.report.report_data import ReportData

SPECIAL = str.maketrans({mark: f"\\{mark}" for mark in "\\`*_[]<>|#!"})


def render_markdown(data: ReportData) -> str:
    """The report's content without its plots."""
    manifest, verify = data.manifest, data.verify
    parts = [
        _badge(data),
        f"# {_text(manifest.family)} for the Apple Neural Engine",
        f"{len(manifest.layers)} of {manifest.n_layers} layers, {_text(manifest.routing)} routing, "
        f"{_text(manifest.weights)} weights, {len(manifest.shards)} packages, context "
        f"{manifest.context}.",
    ]
    if verify and verify.models:
        rows = [
            [
                row.function,
                row.tokens,
                f"{row.top1_agreement:.2%}",
                f"{row.mean_kl:.2e}",
                _number(row.perplexity_golden),
                _number(row.perplexity_shards),
                f"{row.logit_cosine:.6f}",
            ]
            for row in verify.models
        ]
        head = [
            "through",
            "tokens",
            "top-1",
            "mean KL",
            "perplexity, original",
            "shards",
            "logit cosine",
        ]
        parts += ["## Against the original model", _table(head, rows)]
    if verify and verify.shards:
        worst = min(
            (row for row in verify.shards if row.cosine is not None),
            key=lambda row: row.cosine or 0.0,
        )
        passed = sum(row.passed for row in verify.shards)
        parts.append(
            f"{passed} of {len(verify.shards)} functions passed; the worst is "
            f"{_text(worst.path)} {worst.function} with a cosine of {worst.cosine:.6f}."
        )
    if manifest.compression:
        rows = [
            [
                role,
                ", ".join(facts["formats"]),
                f"{facts['bytes'] / 1e6:.2f}",
                f"{facts['bits_per_weight']:.2f}",
                _number(facts.get("relative_error")),
            ]
            for role, facts in sorted(manifest.compression.items())
        ]
        parts += [
            "## Weights",
            _table(["role", "format", "MB", "bits a weight", "relative error"], rows),
        ]
    if data.placement:
        counts = {
            verdict: sum(f.count(verdict) for f in data.placement.functions)
            for verdict in ("ane", "cpu", "gpu", "uncertain")
        }
        parts += [
            "## Placement",
            f"**{data.placement.source}** for {_text(data.placement.target)}, OS "
            f"{_text(data.placement.os)}: {counts['ane']} operations on the engine, "
            f"{counts['cpu']} on the CPU, "
            f"{counts['gpu']} on the GPU, {counts['uncertain']} open.",
        ]
    parts += list(_speed(data))
    versions = ", ".join(
        f"{_text(name)} {_text(number)}" for name, number in sorted(manifest.versions.items())
    )
    return "\n\n".join([*parts, f"Made with {versions}."]) + "\n"


def _badge(data: ReportData) -> str:
    state = {True: "passed", False: "FAILED", None: "not verified"}[data.passed]
    failed = f", {data.verify.failures} gates failed" if data.verify else ""
    return (
        f"**ane-moe: {state}**{failed} · {_text(data.manifest.weights)} · "
        f"{_text(data.manifest.routing)}"
    )


def _speed(data: ReportData) -> Iterable[str]:
    if data.bench and data.bench["decode"]:
        what = (
            "on the device"
            if data.bench["device_figures"]
            else "reference runtime on a CPU, NOT A DEVICE FIGURE"
        )
        rows = [
            [row["fill"], f"{row['tok_s']:.1f}", f"{row['latency']['median_ms']:.1f}"]
            for row in data.bench["decode"]
        ]
        yield f"## Speed, measured ({what})"
        yield _table(["tokens of context", "tok/s", "median ms"], rows)
    if data.predicted:
        speed = data.predicted["decode"]["tok_s"]
        yield f"## Speed, predicted ({_text(data.predicted['chip'])})"
        yield (
            f"{speed['low']:.3g} to {speed['high']:.3g} tok/s, expected {speed['expected']:.3g}: "
            f"{_text(data.predicted['note'])}."
        )


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(_text(cell) if number > 1 else str(cell) for cell in line) + " |"
        for number, line in enumerate(lines)
    )


def _text(value: Any) -> str:
    """Without anything that Markdown or HTML would take for markup."""
    return str(value).translate(SPECIAL).replace("\n", " ")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
