"""Train two small models that differ in one thing, whether layers share a router, and compare the
experts that consecutive layers choose.

    scripts/train_omni.py WORK [--steps 400] [--evaluate-only] [--write]

Both begin with the same seed and see the same text in the same order: the corpus of the built-in
model. WORK/shared and WORK/separate are their checkpoints. Overlaps are of `ane-moe trace` on
held-out files, and `--write` puts them into docs/research.md. Every figure is of the saved fp16
weights, with the arithmetic in fp32.
"""

import argparse
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_training import balance_by_biases, save_checkpoint, say, train_on_text
from doc_page import PagePart
from torch import nn
from torch.nn import functional as F
from train_demo import Corpus, encode, read_corpus, shuffled_windows, train_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ane_moe.files import write_text
from ane_moe.original.omni_moe import OmniMoeConfig, OmniMoeForCausalLM
from ane_moe.routing.recorder import record
from ane_moe.routing.statistics import TraceSummary, summarise

TABLE = PagePart("research.md", "omni")
TWINS = {"shared": True, "separate": False}
CONTEXT, HELD_OUT_PERCENT = 128, 5
PASSAGES, PASSAGE = 64, 128  # held-out ones, evenly out of all files
ARCHITECTURE: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 512,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Settings:
    steps: int = 400
    batch: int = 16  # passages of CONTEXT tokens
    learning_rate: float = 3e-3
    warmup_steps: int = 20
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    seed: int = 0


def build(shared: bool, seed: int, end_of_text: int) -> OmniMoeForCausalLM:
    torch.manual_seed(seed)
    ids = {"eos_token_id": end_of_text, "pad_token_id": end_of_text}
    return OmniMoeForCausalLM(OmniMoeConfig(**ARCHITECTURE, **ids, shared_router=shared))


def train(model: PreTrainedModel, stream: torch.Tensor, settings: Settings) -> None:
    """Train `model` in place on the token stream, reporting to stderr."""
    random = torch.Generator().manual_seed(settings.seed)
    windows = shuffled_windows(stream, CONTEXT, random)
    balance = balance_by_biases(model)
    train_on_text(model, lambda ids: model(ids).logits, windows, settings, balance)


@torch.inference_mode()
def nats(model: nn.Module, passages: list[list[int]]) -> float:
    """Mean loss of a token but each passage's first."""
    ids = torch.tensor(passages)
    predicted = model(ids).logits[:, :-1].flatten(0, 1)
    return float(F.cross_entropy(predicted, ids[:, 1:].flatten()))


def held_out(tokenizer: PreTrainedTokenizerFast, corpus: Corpus) -> list[list[int]]:
    ids = encode(tokenizer, corpus.held_out)
    starts = np.linspace(0, len(ids) - PASSAGE, PASSAGES).astype(int)
    return [ids[start : start + PASSAGE].tolist() for start in starts]


def evaluate(work: Path, passages: list[list[int]]) -> dict[str, tuple[float, TraceSummary]]:
    """By twin the nats of a token, and what its trace says."""
    text = work / "passages.json"
    write_text(text, json.dumps(passages))
    found = {}
    for name in TWINS:
        model = OmniMoeForCausalLM.from_pretrained(work / name, dtype=torch.float32)
        trace = record(work / name, text, window=PASSAGE, max_tokens=PASSAGE * PASSAGES)
        found[name] = nats(model, passages), summarise(trace)
    return found


def table(found: dict[str, tuple[float, TraceSummary]], settings: Settings) -> str:
    pairs = [(one.layer, one.following) for one in found["shared"][1].overlaps]
    head = [f"{layer} to {following}" for layer, following in pairs]
    lines = [
        f"| routers | nats a token | {' | '.join(head)} | mean | by chance |",
        f"|---|{'---:|' * (len(pairs) + 3)}",
    ]
    for name, (lost, summary) in found.items():
        each = " | ".join(f"{one.share:.2f}" for one in summary.overlaps)
        mean, chance = (
            np.mean([getattr(one, field) for one in summary.overlaps])
            for field in ("share", "by_chance")
        )
        lines.append(f"| {name} | {lost:.4f} | {each} | {mean:.2f} | {chance:.2f} |")
    a = ARCHITECTURE
    return "\n".join(
        [
            *lines,
            "",
            f"{a['num_hidden_layers']} layers of {a['num_experts']} experts, "
            f"{a['num_experts_per_tok']} chosen, {a['hidden_size']} channels; {settings.steps} "
            f"steps of {settings.batch * CONTEXT} tokens, seed {settings.seed}; "
            f"{PASSAGES * PASSAGE:,} tokens of CPython {platform.python_version()}'s held-out "
            "sources.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--evaluate-only", action="store_true", help="of what lies in WORK")
    parser.add_argument("--write", action="store_true", help="put the table into docs/research.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings, corpus = Settings(arguments.steps), read_corpus(HELD_OUT_PERCENT)
    tokenizer = train_tokenizer(corpus.train, ARCHITECTURE["vocab_size"])
    if not arguments.evaluate_only:
        stream = encode(tokenizer, corpus.train)
        for name, shared in TWINS.items():
            model = build(shared, settings.seed, tokenizer.eos_token_id)
            say(f"{name}: {model.num_parameters():,} parameters, {len(stream):,} tokens of text")
            train(model, stream, settings)
            save_checkpoint(model, tokenizer, arguments.work / name)
    text = table(evaluate(arguments.work, held_out(tokenizer, corpus)), settings)
    print(text)
    if arguments.write:
        TABLE.write(text)


if __name__ == "__main__":
    main()
