"""How well experts are guessed, by layers ahead and predictor, and what adapters add: on the
built-in model, and on two of 16 experts that are trained for it.

    scripts/measure_predictors.py WORK [--steps 400] [--rank 24] [--write]

One is that of scripts/train_omni.py with separate routers, the other a small DeepSeek-V3, whose
routers score by a sigmoid and are balanced by choice biases alone. WORK/separate and WORK/biased
are their checkpoints, trained where they are missing. Adapters are fitted on two thirds of held-out
passages of the corpus, and judged on the rest. `--write` puts the tables into
docs/streaming.md.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from demo_training import save_checkpoint, say
from doc_page import PagePart
from train_demo import encode, read_corpus, train_tokenizer
from train_omni import ARCHITECTURE, HELD_OUT_PERCENT, Settings, build, train
from transformers import (
    AutoTokenizer,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
)

from ane_moe.conversion.pipeline import convert
from ane_moe.conversion.plan import ConvertOptions
from ane_moe.demo import demo_checkpoint
from ane_moe.early_adapters import write_adapters
from ane_moe.files import write_text
from ane_moe.loop.prefetch import guesses_of
from ane_moe.loop.router_table import choosers
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from ane_moe.manifest import FILE_NAME
from ane_moe.routing.alignment import FIT_SHARE, Alignment, Recall, align, recall

TABLE = PagePart("streaming.md", "predictors")
PASSAGES, PASSAGE = 48, 128
PREFILL = 32
NAMES = {
    "static": "most used",
    "previous": "previous token",
    "router": "router early",
    "adapter": "router on adapter",
    "shard": "the same, by shards",
}
DISTANCES = (1, 2, 3, 4)


# As many experts as those of scripts/train_omni.py, chosen as DeepSeek-V3 does: half of the groups
# are open, a shared expert is beside, and the first layer has none.
BIASED = {
    "vocab_size": ARCHITECTURE["vocab_size"],
    "hidden_size": 96,
    "intermediate_size": 192,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 7,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.0,
    "max_position_embeddings": 512,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
}


def build_biased(seed: int, end_of_text: int) -> DeepseekV3ForCausalLM:
    torch.manual_seed(seed)
    ids = {"eos_token_id": end_of_text, "pad_token_id": end_of_text, "bos_token_id": None}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**BIASED, **ids))


def build_separate(seed: int, end_of_text: int) -> PreTrainedModel:
    return build(False, seed, end_of_text)


def trained(folder: Path, make: Callable[[int, int], PreTrainedModel], steps: int) -> Path:
    """The checkpoint of a model of 16 experts."""
    if not folder.is_dir():
        corpus, started = read_corpus(HELD_OUT_PERCENT), time.process_time()
        tokenizer = train_tokenizer(corpus.train, ARCHITECTURE["vocab_size"])
        settings = Settings(steps)
        model = make(settings.seed, tokenizer.eos_token_id)
        train(model, encode(tokenizer, corpus.train), settings)
        save_checkpoint(model, tokenizer, folder)
        say(f"trained in {time.process_time() - started:.0f} CPU seconds")
    return folder


def passages(checkpoint: Path, path: Path) -> Path:
    """Held-out passages of the corpus as ids, evenly out of all files."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = encode(tokenizer, read_corpus(HELD_OUT_PERCENT).held_out)
    starts = np.linspace(0, len(ids) - PASSAGE, PASSAGES).astype(int)
    write_text(path, json.dumps([ids[start : start + PASSAGE].tolist() for start in starts]))
    return path


def measure(checkpoint: Path, out: Path, rank: int) -> Alignment:
    """Convert where that is not done, and fit."""
    if not (out / FILE_NAME).is_file():
        convert(checkpoint, out, ConvertOptions(routing="sparse", prefill=PREFILL))
    text = passages(checkpoint, out.with_suffix(".json"))
    found = align(out, text, rank=rank, distances=DISTANCES, runtime="reference")
    file = out.with_suffix(".npz")
    write_adapters(found.adapters, file)
    own: list[Recall] = []
    for far in sorted({far for _, far in found.adapters.ahead}):
        shape = ConvertOptions(routing="sparse", prefill=0, early=str(file), ahead=far)
        report = convert(checkpoint, out.with_name(f"{out.name}-{far}"), shape, overwrite=True)
        own += by_shards(report.folder, far, json.loads(text.read_text()))
    return replace(found, recalls=(*found.recalls, *own))


def by_shards(out: Path, far: int, texts: list[list[int]]) -> list[Recall]:
    """What shards guess, on the passages that are left out of the fit."""
    shards = load_shards(out, "reference")
    session, pairs = Session(shards), guesses_of(shards.manifest)
    scores: dict[int, list[np.ndarray]] = {layer: [] for layer in pairs}
    chosen: dict[int, list[np.ndarray]] = {layer: [] for layer in pairs}
    for text in texts[int(len(texts) * FIT_SHARE) :]:
        session.reset()
        for identifier in text:
            session.prefill([identifier])
            for layer, meant in pairs.items():
                scores[layer].append(session.slot(f"guess.{layer}").T.astype(np.float32))
                chosen[layer].append((session.slot(f"gates.{meant}") != 0).T)
    rows = []
    for layer, meant in pairs.items():
        chooser = choosers(shards.manifest)[meant]
        given, k = chooser.eligible(np.concatenate(scores[layer])), chooser.k
        wanted = np.concatenate(chosen[layer])
        rows.append(
            Recall("shard", far, meant, *(recall(given, wanted, k * times) for times in (1, 2)))
        )
    return rows


def table(title: str, found: Alignment) -> str:
    means = found.means
    distances = sorted({far for _, far in means})
    head = " | ".join(f"{far} ahead | of 2k" for far in distances)
    lines = [f"| {title} | {head} |", f"|---|{'---:|' * (2 * len(distances))}"]
    for name, shown in NAMES.items():
        cells = (f"{share:.1%}" for far in distances for share in means[name, far])
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    gains = (
        100 * (ours - plain)
        for far in distances
        for ours, plain in zip(means["adapter", far], means["router", far], strict=True)
    )
    lines.append(f"| gain, points | {' | '.join(f'{gain:+.1f}' for gain in gains)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--rank", type=int, default=24)
    parser.add_argument("--write", action="store_true", help="put it into docs/streaming.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    models = {
        "built-in, 8 experts": (demo_checkpoint(), arguments.work / "demo-sparse"),
    }
    for title, name, make in (
        ("16 experts", "separate", build_separate),
        ("16 experts, choice biases", "biased", build_biased),
    ):
        folder = arguments.work / name
        models[title] = trained(folder, make, arguments.steps), folder.with_name(f"{name}-sparse")
    tables = []
    for title, (checkpoint, out) in models.items():
        started = time.process_time()
        found = measure(checkpoint, out, arguments.rank)
        say(f"{title}: {time.process_time() - started:.0f} CPU seconds, {os.getloadavg()[0]:.1f}")
        tables.append(table(title, found))
    note = (
        f"Rank {arguments.rank}; {PASSAGES * PASSAGE:,} tokens of held-out sources, two thirds of "
        "the passages for the fit, the rest for the figures; 2 experts a token."
    )
    text = "\n\n".join([*tables, note])
    print(text)
    if arguments.write:
        TABLE.write(text)


if __name__ == "__main__":
    main()
