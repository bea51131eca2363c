"""Every weight format on the built-in model: size, time, and what it loses on text the model never
saw.

    scripts/measure_formats.py [FORMAT ...] [--tokens 2048] [--results FILE] [--write]
    scripts/measure_formats.py server int4-channel lut4 lut3 apple2 --write --table rate

The text is what scripts/train_demo.py held out, cut into passages of 512 tokens. Perplexity, KL and
top-1 are the shards', run by the reference runtime through the prefill functions, against Hugging
Face's model in fp32. `--results` keeps rows, so that a run can go on; `--write` puts the table, and
of the formats a plot, into docs/.
"""

import argparse
import json
import os
import platform
import re
import shutil
import tempfile
import time
from pathlib import Path

from doc_page import DOCS, PagePart
from matplotlib.figure import Figure
from tokenizers import Tokenizer
from train_demo import read_corpus

from ane_moe.conversion.pipeline import convert
from ane_moe.conversion.plan import ConvertOptions
from ane_moe.demo import demo_checkpoint
from ane_moe.formats.recipe import find_recipe
from ane_moe.manifest import read_manifest
from ane_moe.verification.verify import verify

FORMATS = [
    "fp16",
    "int8",
    "int4-channel",
    "lut8",
    "lut6",
    "lut4",
    "lut4-tensor",
    "lut3",
    "lut2",
    "lut4+scale",
    "lut4-v2",
    "lut8-v4",
    "apple2",
    "apple2 rank 16",
    "int4-block32",
    "sparse50",
    "sparse50+int8",
    "sparse50+lut4",
    "safe",
    "small",
    "server",
    "tiny",
    "small calibrated",
    "budget 1.9 MB",
]
HELD_OUT_PERCENT = 5
PASSAGE = 512
HEAD = (
    "| format | bits a weight | MB | convert s | worst cosine | mean KL | perplexity | against "
    "fp32 | top-1 |"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("formats", nargs="*", default=FORMATS)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument(
        "--results", type=Path, help="keep rows here, and measure only what is not there"
    )
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--table", choices=("formats", "rate"), default="formats")
    arguments = parser.parse_args()
    kept = (
        json.loads(arguments.results.read_text())
        if arguments.results and arguments.results.exists()
        else {}
    )
    with tempfile.TemporaryDirectory() as scratch:
        prompts = held_out(Path(scratch) / "prompts.json", arguments.tokens, demo_checkpoint())
        rows = []
        for name in arguments.formats:
            if name not in kept:
                kept[name] = measure(name, Path(scratch) / "out", prompts, demo_checkpoint())
                shutil.rmtree(Path(scratch) / "out")
                if arguments.results:
                    arguments.results.write_text(json.dumps(kept, indent=1))
            rows.append(kept[name])
            print(line(rows[-1]), flush=True)
    if arguments.write:
        write(rows, arguments.tokens, arguments.table)
        if arguments.table == "formats":
            plot(rows)


def held_out(path: Path, tokens: int, checkpoint: Path) -> Path:
    """Passages of the held-out files, one from each until there are enough."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    passages: list[list[int]] = []
    for text in read_corpus(HELD_OUT_PERCENT).held_out:
        ids = tokenizer.encode(text, add_special_tokens=False).ids[:PASSAGE]
        if len(ids) == PASSAGE and len(passages) * PASSAGE < tokens:
            passages.append(ids)
    path.write_text(json.dumps(passages))
    return path


def options_of(name: str) -> ConvertOptions:
    if found := re.fullmatch(r"budget ([\d.]+) MB", name):
        return ConvertOptions(context=PASSAGE, budget_mb=float(found[1]))
    base, _, extra = name.partition(" ")
    recipe = find_recipe(
        base, rank=int(extra.removeprefix("rank ")) if extra.startswith("rank") else None
    )
    return ConvertOptions(
        context=PASSAGE, recipe=recipe, calibrate="builtin" if extra == "calibrated" else None
    )


def measure(name: str, out: Path, prompts: Path, checkpoint: Path) -> dict:
    """What the format called `name` makes of `checkpoint`, converted into `out`."""
    started = time.perf_counter()
    convert(checkpoint, out, options_of(name))
    seconds = time.perf_counter() - started
    manifest = read_manifest(out)
    report = verify(
        out,
        checkpoint=checkpoint,
        prompts=prompts,
        runtime="reference",
        min_cosine=-1,
        min_logit_cosine=-1,
    )
    assert report.as_stored is None or not report.as_stored.failures, report.as_stored
    model = next(row for row in report.models if row.function == "prefill")
    roles = manifest.compression.values()
    weights = sum(facts["weights"] for facts in roles)
    return {
        "name": name,
        "bits": 8 * sum(facts["bytes"] for facts in roles) / weights if weights else 16.0,
        "mb": sum(shard.weight_bytes for shard in manifest.shards) / 1e6,
        "seconds": seconds,
        "cosine": min(row.cosine for row in report.shards if row.cosine is not None),
        "kl": model.mean_kl,
        "perplexity": model.perplexity_shards,
        "ratio": model.perplexity_shards / model.perplexity_golden - 1,
        "top1": model.top1_agreement,
    }


def line(row: dict) -> str:
    return (
        f"| `{row['name']}` | {row['bits']:.2f} | {row['mb']:.2f} | {row['seconds']:.1f} | "
        f"{row['cosine']:.4f} | "
        f"{row['kl']:.2e} | {row['perplexity']:.2f} | {row['ratio']:+.2%} | {row['top1']:.1%} |"
    )


def write(rows: list[dict], tokens: int, name: str) -> None:
    """The table between its markers in docs/compression.md."""
    conditions = (
        f"{tokens:,} tokens of held-out text (CPython {platform.python_version()}) in passages of "
        f"{PASSAGE}; "
        f"reference runtime on {os.cpu_count()} cores. Conversion is by one process."
    )
    table = "\n".join([HEAD, "|---|" + "---:|" * 8, *map(line, rows), "", conditions])
    PagePart("compression.md", name).write(table)


def plot(rows: list[dict]) -> None:
    """Beside the page."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.scatter([row["mb"] for row in rows], [1 + row["ratio"] for row in rows], s=18)
    for row in rows:
        axes.annotate(
            row["name"],
            (row["mb"], 1 + row["ratio"]),
            fontsize=6,
            xytext=(3, 3),
            textcoords="offset points",
        )
    axes.set(
        xlabel="MB of weights in the packages",
        ylabel="perplexity over that of fp32",
        yscale="log",
        title="The built-in model: quality against size",
    )
    figure.savefig(DOCS / "compression.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
