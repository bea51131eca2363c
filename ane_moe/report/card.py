"""The model card of a conversion on the Hub: YAML for its search, then gates with their numbers,
how it was made, how large it is, what is predicted, and where the golden came from."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from ane_moe.report.markdown import markdown_table, markdown_text, render_markdown
from ane_moe.report.report_data import ReportData
from ane_moe.verification.result import ShardResult, VerifyReport

MB = 1e6
TAGS = ("coreml", "apple-neural-engine", "mixture-of-experts", "ane-moe")


def render_card(data: ReportData, repository: str, licence: str | None) -> str:
    """README.md of `repository`; `licence` as the Hub calls it, None where nobody knows it."""
    parts = [_front_matter(data, licence), render_markdown(data).rstrip(), *_sections(data)]
    return "\n\n".join([*parts, _use(data, repository)]) + "\n"


def _front_matter(data: ReportData, licence: str | None) -> str:
    """JSON's texts and lists are YAML's too, and cannot break out of it."""
    manifest = data.manifest
    facts: dict[str, Any] = {"library_name": "ane-moe", "tags": [*TAGS, manifest.family]}
    facts["pipeline_tag"] = "token-classification" if manifest.labels else "text-generation"
    if licence:
        facts["license"] = licence
    if base := manifest.origin.get("hub"):
        facts |= {"base_model": base, "base_model_relation": "quantized"}
    return "\n".join(["---", *(f"{name}: {json.dumps(v)}" for name, v in facts.items()), "---"])


def _sections(data: ReportData) -> Iterator[str]:
    if data.verify:
        yield "## Gates"
        yield _gates(data.verify)
    yield "## How it was made"
    yield markdown_table(["what", "how"], _recipe(data))
    yield "## Sizes"
    yield markdown_table(["packages", "count", "functions", "MB"], _sizes(data))
    yield "## Provenance"
    yield _provenance(data)


def _gates(report: VerifyReport) -> str:
    """The worst function of each kind, and the whole model, beside their limits."""
    groups: dict[tuple[str, str], list[ShardResult]] = {}
    for row in report.shards:
        groups.setdefault((row.kind, row.function), []).append(row)
    rows: list[Sequence[Any]] = []
    for (kind, function), group in groups.items():
        worst = min(group, key=lambda row: -2.0 if row.margin is None else row.margin)
        passed = f"{sum(row.passed for row in group)} of {len(group)}"
        cosine, error = _figure(worst.cosine), _figure(worst.relative_l2)
        limit = f"cosine {worst.min_cosine:g}, relative L2 {worst.max_relative_l2:g}"
        rows.append([f"{kind} {function}", passed, cosine, error, limit])
    for model in report.models:
        limit = f"logit cosine {model.min_logit_cosine:g}"
        passed = "1 of 1" if model.passed else "0 of 1"
        name = f"whole model, {model.function}"
        rows.append([name, passed, _figure(model.logit_cosine), "-", limit])
    head = ["function", "passed", "worst cosine", "its relative L2", "limits"]
    return markdown_table(head, rows)


def _recipe(data: ReportData) -> Iterator[Sequence[Any]]:
    manifest = data.manifest
    yield "routing", manifest.routing
    yield "weights", manifest.weights
    yield "recipe", json.dumps(manifest.recipe, sort_keys=True)
    yield "caches", manifest.state
    yield "context", manifest.context
    yield "options", json.dumps(manifest.source, sort_keys=True)
    for name, number in sorted(manifest.versions.items()):
        yield f"version of {name}", number


def _sizes(data: ReportData) -> Iterator[Sequence[Any]]:
    shards = data.manifest.shards
    for kind in dict.fromkeys(shard.kind for shard in shards):
        own = [shard for shard in shards if shard.kind == kind]
        functions = sum(len(shard.functions) for shard in own)
        yield kind, len(own), functions, f"{sum(shard.weight_bytes for shard in own) / MB:,.1f}"
    total = f"{sum(shard.weight_bytes for shard in shards) / MB:,.1f}"
    yield "all", len(shards), sum(len(shard.functions) for shard in shards), total


def _provenance(data: ReportData) -> str:
    manifest = data.manifest
    of = manifest.origin.get("hub")
    commit = manifest.origin.get("revision", "")
    source = f"{of} at commit {commit}" if of else "a local checkpoint"
    lines = [f"Converted from {markdown_text(source)}."]
    if manifest.golden:
        digest = manifest.files.get(manifest.golden, "unknown")
        lines.append(
            f"The golden, `{markdown_text(manifest.golden)}` (sha256 `{digest}`), is what Hugging "
            "Face's own code computed of that checkpoint in fp32; the gates compare with it."
        )
    else:
        lines.append("There is no golden: nothing here says that the shards are right.")
    lines.append(f"`runtime_meta.json` has the sha256 of all {len(manifest.files)} files.")
    return "\n".join(lines)


def _use(data: ReportData, repository: str) -> str:
    verb = "redact" if data.manifest.labels else "generate"
    then = '"Mail jane@example.org"' if data.manifest.labels else '--prompt "Once upon"'
    lines = [f"ane-moe verify hf://{repository}", f"ane-moe {verb} hf://{repository} {then}"]
    return "\n".join(["## Use", "", "```", *lines, "```"])


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.6f}"
