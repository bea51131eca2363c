"""Fine-tune a checkpoint at two bits a weight: `--compress apple2` then carries it over as it is.

    scripts/train_qat.py [CHECKPOINT] [--out FOLDER] [--steps 1200] [--evaluate-only] [--write]

After the recipe of Apple's on-device model (its 2025 foundation model report): every matrix that a
conversion compresses is read at four levels of a learned scale (two_bits.py) while the weights
behind it are trained, at a low learning rate and without weight decay; what is kept is the running
average of weights and scales, rounded. Routers, norms and biases are trained along. The text is
what the built-in model learnt from; a checkpoint needs a tokenizer. Measured are conversions, on
the held-out part: of CHECKPOINT in fp16 and in `apple2`, and of what training gave in `apple2`,
whose matrices have to be in the package bit for bit. `--write` puts the table into
docs/research.md.
"""

import argparse
import json
import math
import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_card import RECORD
from demo_training import replace_folder, save_checkpoint, say, train_on_text
from doc_page import PagePart
from measure_formats import HELD_OUT_PERCENT, PASSAGE, held_out, measure
from research_card import Card, cpu_seconds, record_of, write_record
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from train_demo import Corpus, encode, read_corpus, shuffled_windows
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from two_bits import TwoBitModel

from ane_moe.demo import demo_checkpoint
from ane_moe.manifest import read_manifest
from ane_moe.opened import open_model
from ane_moe.original.stored_weights import stored_weights

TABLE = PagePart("research.md", "qat")
TOKENS = 4096  # held-out ones that conversions are measured on
HEAD = "| weights | bits a weight | nats a token | above fp16 | lost by conversion | perplexity |\n"
CARD = Card(
    "two-bit",
    "The built-in language model, fine-tuned with every matrix that a conversion compresses at\n"
    "two bits a weight, by the recipe of Apple's on-device model. `--compress apple2` carries it\n"
    "over bit for bit.",
    {
        "architecture": "Hugging Face `qwen3_moe`, as the built-in model",
        "weights": "-1.5, -0.5, 0.5 or 1.5 times a scale of each row; the router and norms are not",
        "began as": "the built-in model",
    },
    "train_qat.py",
)


@dataclass(frozen=True)
class Settings:
    """`averaged` is the share that a step keeps of the running average."""

    steps: int = 1200
    batch: int = 8
    context: int = 256
    learning_rate: float = 2e-3
    warmup_steps: int = 20
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    averaged: float = 0.98
    seed: int = 0


def train_checkpoint(checkpoint: Path, corpus: Corpus, settings: Settings, folder: Path) -> None:
    """Fine-tune what lies in `checkpoint`, and save it in `folder` with its weights rounded."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    model = TwoBitModel(original(checkpoint))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.averaged))
    random = torch.Generator().manual_seed(settings.seed)
    windows = shuffled_windows(encode(tokenizer, corpus.train), settings.context, random)
    train_on_text(model, model, windows, settings, lambda: average.update_parameters(model))
    save_checkpoint(average.module.snapped(), tokenizer, folder)


def original(checkpoint: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, experts_implementation="eager"
    )


def measured(checkpoint: Path, trained: Path) -> list[dict]:
    """Of the three conversions what `measure` says, the last with a count of the matrices that are
    the checkpoint's bit for bit."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        prompts = held_out(Path(scratch) / "prompts.json", TOKENS, checkpoint)
        conversions = {"fp16": checkpoint, "apple2": checkpoint, "apple2, trained": trained}
        for number, (name, source) in enumerate(conversions.items()):
            out = Path(scratch) / str(number)
            row = measure(name.partition(",")[0], out, prompts, source)
            rows.append({**row, "name": name, "nats": math.log(row["perplexity"])})
        matrices, carried = count_carried(trained, out)
    if carried < matrices:
        raise SystemExit(
            f"of {matrices} matrices {matrices - carried} were not carried over as they are"
        )
    return [*rows[:-1], {**rows[-1], "matrices": matrices}]


def count_carried(checkpoint: Path, out: Path) -> tuple[int, int]:
    """The compressed matrices of the conversion in `out`, and of them those that expand to the
    checkpoint's numbers, bit for bit."""
    model, matrices, carried = open_model(checkpoint), 0, 0
    for weight in stored_weights(read_manifest(out).shards, out):
        source = model.sources[weight.name]
        if source.role is None:
            continue
        part = source.part(*weight.rows) if weight.rows else source
        meant = model.checkpoint.read(part)
        matrices += 1
        carried += weight.value.reshape(meant.shape).tobytes() == meant.tobytes()
    return matrices, carried


def table(rows: list[dict], settings: Settings) -> str:
    least, most = rows[0]["nats"], rows[1]["nats"]
    lines = [
        f"| {row['name']} | {row['bits']:.2f} | {row['nats']:.4f} | {row['nats'] - least:+.4f} | "
        f"{math.log1p(row['ratio']):+.4f} | {row['perplexity']:.2f} |"
        for row in rows
    ]
    closed = (most - rows[2]["nats"]) / (most - least)
    return "\n".join(
        [
            HEAD + "|---|---:|---:|---:|---:|---:|",
            *lines,
            "",
            f"Training closes {closed:.0%} of the gap, by {settings.steps} steps of "
            f"{settings.batch * settings.context:,} tokens. All {rows[2]['matrices']} matrices are "
            f"in the package bit for bit. {TOKENS:,} tokens of held-out text (CPython "
            f"{platform.python_version()}) in passages of {PASSAGE}, by the shards and the "
            "reference runtime; what conversion loses is against the checkpoint itself in fp32.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, nargs="?", default=demo_checkpoint())
    parser.add_argument("--out", type=Path, default=demo_checkpoint().parent / CARD.name)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--learning-rate", type=float, default=Settings.learning_rate)
    parser.add_argument("--evaluate-only", action="store_true", help="of what lies in OUT")
    parser.add_argument("--write", action="store_true", help="put the table into docs/research.md")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    corpus = read_corpus(HELD_OUT_PERCENT)
    if asked.evaluate_only:
        kept = json.loads((asked.out / RECORD).read_text())
        settings, seconds = Settings(**kept["settings"]), kept["cpu_seconds"]
    else:
        settings = Settings(asked.steps, learning_rate=asked.learning_rate)
        with tempfile.TemporaryDirectory(dir=asked.out.parent) as temporary:
            folder = Path(temporary) / "checkpoint"
            train_checkpoint(asked.checkpoint, corpus, settings, folder)
            replace_folder(folder, asked.out)
        seconds = cpu_seconds()
    rows = measured(asked.checkpoint, asked.out)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(asked.out)
    record = record_of(original(asked.out), tokenizer, corpus, settings, seconds, rows)
    text = table(rows, settings)
    write_record(CARD, record, asked.out, f"\n## At two bits\n\n{text}\n")
    say(text)
    if asked.write:
        TABLE.write(text)


if __name__ == "__main__":
    main()
