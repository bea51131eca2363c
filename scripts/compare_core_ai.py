"""Hold the reference runtime to Apple's Core AI runtime, over the tests' small families.

    python scripts/compare_core_ai.py RESULTS.jsonl [FAMILY ...]

Each family is made, converted in fp16 (masked, prefill of 16, with a golden of two prompts) and
judged by `check_against`; its rows are appended to RESULTS.jsonl, and families that are there are
not done again. Prints the tables of docs/coreai.md from all of the file.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ane_moe.conversion.pipeline import convert  # noqa: E402
from ane_moe.conversion.plan import ConvertOptions  # noqa: E402
from ane_moe.errors import UserError  # noqa: E402
from ane_moe.formats.recipe import FP16  # noqa: E402
from ane_moe.verification.against import check_against  # noqa: E402
from tests.models import FAMILIES, make_model, save_checkpoint  # noqa: E402
from tests.zoo import ROWS  # noqa: E402

ENCODERS = ("openai_privacy_filter",)
PROMPTS = [np.random.default_rng(seed).integers(3, 211, 30).tolist() for seed in (0, 1)]
HEAD = (
    "| family | parts | values | equal | worst, beyond rounding | where | states | "
    "least cosine to Hugging Face |\n|---|---|---|---|---|---|---|---|"
)


def judged(family: str, folder: Path) -> dict[str, Any]:
    """The report of one family, as JSON has it."""
    seed = ROWS[family].seed if family in ROWS else 0
    checkpoint = save_checkpoint(make_model(family, seed=seed), folder / "checkpoint")
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    shape: dict[str, Any] = {"prefill": 16, "context": 64}
    if family in ENCODERS:
        shape = {"lengths": (16, 32)}
    options = ConvertOptions(recipe=FP16, **shape)
    out = folder / "out"
    convert(checkpoint, out, options, golden=True, prompts=folder / "prompts.json")
    return check_against(out, "coreai").as_json() | {"family": family}


def row(report: dict[str, Any]) -> str:
    """A line of the table."""
    if "refused" in report:
        return f"| {report['family']} | not compared: {report['refused']} | | | | | | |"
    pairs, golden = report["pairs"], report["golden"]
    worst = max(pairs, key=lambda pair: pair["beyond"])
    states = [pair["beyond"] for pair in pairs if not _is_output(pair)]
    equal = sum(pair["max_abs_error"] == 0 for pair in pairs)
    where = f"{worst['kind']} {worst['function']} {worst['value']}" if worst["beyond"] else "-"
    cosine = min((one["cosine"] for one in golden if one["cosine"] is not None), default=None)
    cells = (
        report["family"] + ("" if report["passed"] else " (failed)"),
        f"{report['parts']} of {report['shards']}",
        str(len(pairs)),
        str(equal),
        f"{worst['beyond']:.1e}",
        where,
        f"{max(states):.1e}" if states else "none",
        "-" if cosine is None else f"{cosine:.6f}",
    )
    return f"| {' | '.join(cells)} |"


def by_part(reports: list[dict[str, Any]]) -> Iterator[str]:
    """The worst of each kind of value, over all families."""
    yield "| part | value | pairs | equal | relative L2 | beyond rounding | largest error | worst |"
    yield "|---|---|---|---|---|---|---|---|"
    parts: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for report in reports:
        for pair in report.get("pairs", ()):
            parts.setdefault((pair["kind"], pair["value"]), []).append(pair | report)
    for (kind, value), pairs in sorted(parts.items()):
        worst = max(pairs, key=lambda pair: (pair["beyond"], pair["relative_l2"]))
        cells = (
            kind,
            value,
            str(len(pairs)),
            str(sum(pair["max_abs_error"] == 0 for pair in pairs)),
            f"{max(pair['relative_l2'] for pair in pairs):.1e}",
            f"{worst['beyond']:.1e}",
            f"{max(pair['max_abs_error'] for pair in pairs):.1e}",
            worst["family"],
        )
        yield f"| {' | '.join(cells)} |"


def _is_output(pair: dict[str, Any]) -> bool:
    return pair["value"].endswith("_out") or pair["value"] in ("y", "gates", "logits")


def table(reports: list[dict[str, Any]]) -> Iterator[str]:
    """The whole table."""
    yield HEAD
    yield from (row(report) for report in sorted(reports, key=lambda one: one["family"]))


def main() -> None:
    torch.set_num_threads(1)
    results = Path(sys.argv[1])
    lines = results.read_text().splitlines() if results.is_file() else []
    reports = [json.loads(line) for line in lines]
    done = {report["family"] for report in reports}
    for family in sys.argv[2:] or (*FAMILIES, *ROWS):
        if family in done:
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                report = judged(family, Path(folder))
            except UserError as error:
                report = {"family": family, "refused": str(error)}
        report.pop("folder", None)
        reports.append(report)
        with results.open("a") as file:
            file.write(json.dumps(report) + "\n")
        print(row(report), file=sys.stderr)
    print("\n".join((*table(reports), "", *by_part(reports))))


if __name__ == "__main__":
    main()
