"""The report as Markdown, for a model card: a badge-like first line, then the tables."""

from collections.abc import Iterable, Sequence
from typing import Any

from ane_moe.report.report_data import ReportData
from ane_moe.report.verify_table import span_figure
from ane_moe.verification.result import FunctionModelResult

SPECIAL = str.maketrans({mark: f"\\{mark}" for mark in "\\`*_[]<>|#!"})


def render_markdown(data: ReportData) -> str:
    """The report's content without its plots."""
    manifest, verify = data.manifest, data.verify
    parts = [
        _badge(data),
        f"# {markdown_text(manifest.family)} for the Apple Neural Engine",
        f"{len(manifest.layers)} of {manifest.n_layers} layers, "
        f"{markdown_text(manifest.routing)} routing, "
        f"{markdown_text(manifest.weights)} weights, {len(manifest.shards)} packages, context "
        f"{manifest.context}.",
    ]
    if manifest.synchronisations:
        parts.append(f"{manifest.synchronisations.sentence}.")
    if verify and verify.models:
        parts += ["## Against the original model", _models(verify.models)]
    if verify and verify.shards:
        worst = min(
            (row for row in verify.shards if row.cosine is not None),
            key=lambda row: row.cosine or 0.0,
        )
        passed = sum(row.passed for row in verify.shards)
        parts.append(
            f"{passed} of {len(verify.shards)} functions passed; the worst is "
            f"{markdown_text(worst.path)} {worst.function} with a cosine of {worst.cosine:.6f}."
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
            markdown_table(["role", "format", "MB", "bits a weight", "relative error"], rows),
        ]
    if data.placement:
        counts = {
            verdict: sum(f.count(verdict) for f in data.placement.functions)
            for verdict in ("ane", "cpu", "gpu", "uncertain")
        }
        parts += [
            "## Placement",
            f"**{data.placement.source}** for {markdown_text(data.placement.target)}, OS "
            f"{markdown_text(data.placement.os)}: {counts['ane']} operations on the engine, "
            f"{counts['cpu']} on the CPU, "
            f"{counts['gpu']} on the GPU, {counts['uncertain']} open.",
        ]
    parts += list(_speed(data))
    if data.core_ai:
        parts += ["## Core AI", "\n".join(f"- {markdown_text(line)}" for line in data.core_ai)]
    versions = ", ".join(
        f"{markdown_text(name)} {markdown_text(number)}"
        for name, number in sorted(manifest.versions.items())
    )
    return "\n\n".join([*parts, f"Made with {versions}."]) + "\n"


def _badge(data: ReportData) -> str:
    state = {True: "passed", False: "FAILED", None: "not verified"}[data.passed]
    failed = f", {data.verify.failures} gates failed" if data.verify else ""
    return (
        f"**ane-moe: {state}**{failed} · {markdown_text(data.manifest.weights)} · "
        f"{markdown_text(data.manifest.routing)}"
    )


def _models(models: Sequence[FunctionModelResult]) -> str:
    of_labels = models[0].of_labels
    rows = [
        [
            row.function,
            row.tokens,
            f"{row.top1_agreement:.2%}",
            f"{row.mean_kl:.2e}",
            *_of_text(row),
            f"{row.logit_cosine:.6f}",
        ]
        for row in models
    ]
    of_text = ["same spans"] if of_labels else ["perplexity, original", "shards"]
    same = "same label" if of_labels else "top-1"
    return markdown_table(["through", "tokens", same, "mean KL", *of_text, "logit cosine"], rows)


def _of_text(row: FunctionModelResult) -> list[str]:
    """Spans of labels, which do not follow from each other; else perplexities."""
    if row.of_labels:
        return [span_figure(row)]
    return [_number(row.perplexity_golden), _number(row.perplexity_shards)]


def _speed(data: ReportData) -> Iterable[str]:
    rows = [*data.bench["decode"], *data.bench.get("windows", ())] if data.bench else []
    if data.bench and rows:
        what = (
            "on the device"
            if data.bench["device_figures"]
            else f"{data.bench.get('runtime', 'reference')} runtime on a CPU, NOT A DEVICE FIGURE"
        )
        first, count = ("context", "fill") if data.bench["decode"] else ("a window", "tokens")
        yield f"## Speed, measured ({what})"
        yield markdown_table(
            [f"tokens of {first}", "tok/s", "median ms"],
            [
                [row[count], f"{row['tok_s']:.1f}", f"{row['latency']['median_ms']:.1f}"]
                for row in rows
            ],
        )
    if data.predicted:
        speed = data.predicted["decode"]["tok_s"]
        yield f"## Speed, predicted ({markdown_text(data.predicted['chip'])})"
        yield (
            f"{speed['low']:.3g} to {speed['high']:.3g} tok/s, expected {speed['expected']:.3g}: "
            f"{markdown_text(data.predicted['note'])}."
        )


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; nothing in its rows becomes markup."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(markdown_text(cell) if number > 1 else str(cell) for cell in line) + " |"
        for number, line in enumerate(lines)
    )


def markdown_text(value: Any) -> str:
    """Without anything that Markdown or HTML would take for markup."""
    return str(value).translate(SPECIAL).replace("\n", " ")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
