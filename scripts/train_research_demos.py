"""Train the packaged demos of research systems, and write their cards.

    scripts/train_research_demos.py [NAME ...] [--steps 300] [--evaluate-only]

Small language models of Python source code by the reference models of ane_moe/original, which have
the papers' architectures; one tokenizer for all, trained on the same text as they. Every figure of
a card is of the saved fp16 weights, with the arithmetic in fp32. `two-bit` is of train_qat.py.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from demo_card import RECORD
from demo_training import replace_folder, save_checkpoint, say, train_on_text
from research_card import Card, cpu_seconds, record_of, render_card, write_record
from train_demo import Corpus, encode, read_corpus, shuffled_windows, train_tokenizer
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from ane_moe.demo import demo_checkpoint
from ane_moe.original.afm import AfmConfig, AfmForCausalLM
from ane_moe.original.omni_moe import OmniMoeConfig, OmniMoeForCausalLM
from ane_moe.original.pt_moe import PtMoeConfig, PtMoeForCausalLM

DEMOS = demo_checkpoint().parent
HELD_OUT_PERCENT = 5
COMMON: dict[str, Any] = {
    "vocab_size": 1024,
    "max_position_embeddings": 256,
    "initializer_range": 0.05,  # 0.02 is for widths in the thousands
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Settings:
    """What the training depends on besides the corpus; a step sees `batch` windows of `context`
    tokens."""

    steps: int = 300
    batch: int = 8
    context: int = 256
    learning_rate: float = 3e-3
    warmup_steps: int = 20
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Demo:
    """One of the models: its classes, its sizes, and what its card says."""

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    sizes: Mapping[str, Any]
    about: str
    facts: Mapping[str, str]


MODELS = {
    "pt-moe": Demo(
        PtMoeConfig,
        PtMoeForCausalLM,
        {
            "hidden_size": 64,
            "num_hidden_layers": 8,
            "num_tracks": 4,
            "track_depth": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "intermediate_size": 32,
            "moe_intermediate_size": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 32,
        },
        "A tiny mixture-of-experts language model of parallel tracks, after Apple's server model\n"
        "(arXiv 2602.07306 and 2507.13575).",
        {
            "architecture": "`pt_moe`: 4 tracks of 8 layers that meet after every fourth",
            "widths": "d_model 64, 2 query heads and 1 key/value head of 16 a track",
            "experts": "4 in every other layer of a track, top-2, no token dropped",
            "attention": "of four layers three see 32 tokens and rotate, one sees all and does not",
        },
    ),
    "omni-moe": Demo(
        OmniMoeConfig,
        OmniMoeForCausalLM,
        {
            "hidden_size": 96,
            "intermediate_size": 64,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 24,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
        "A tiny mixture-of-experts language model with one router for all layers, after\n"
        "Omni-Router (arXiv 2507.05724).",
        {
            "architecture": "`omni_moe`: 6 layers, d_model 96, 4 query and 2 key/value heads of 24",
            "experts": "8 per layer, top-2, SwiGLU 64 wide, one router for all layers",
        },
    ),
    "afm": Demo(
        AfmConfig,
        AfmForCausalLM,
        {
            "hidden_size": 80,
            "intermediate_size": 260,
            "num_hidden_layers": 8,
            "num_kv_reuse_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 20,
        },
        "A tiny language model whose last layers read the keys and values of an earlier one,\n"
        "after Apple's on-device model (arXiv 2507.13575).",
        {
            "architecture": "`afm`: 8 layers, d_model 80, 4 query and 2 key/value heads of 20",
            "caches": "of 5 layers; the last 3 read those of the fifth. Rounded to 8 bits",
            "MLPs": "dense, SwiGLU 260 wide",
        },
    ),
}


def train_checkpoint(
    demo: Demo,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    settings: Settings,
    folder: Path,
) -> None:
    """Train one of the models and save it in `folder`, the weights in float16."""
    torch.manual_seed(settings.seed)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    model = demo.model(demo.config(**COMMON, **demo.sizes, **ids))
    say(f"{model.config.model_type}: {model.num_parameters():,} parameters")
    random = torch.Generator().manual_seed(settings.seed)
    windows = shuffled_windows(encode(tokenizer, corpus.train), settings.context, random)
    train_on_text(model, lambda ids: model(input_ids=ids).logits, windows, settings)
    save_checkpoint(model, tokenizer, folder)


def evaluate_checkpoint(
    name: str, corpus: Corpus, settings: Settings, seconds: float, folder: Path
) -> None:
    """Measure the checkpoint as saved in `folder`, and write its record and card there."""
    demo = MODELS[name]
    model = demo.model.from_pretrained(folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    record = record_of(model, tokenizer, corpus, settings, seconds)
    card = Card(name, demo.about, demo.facts, Path(__file__).name)
    write_record(card, record, folder)
    say(render_card(card, record, ""))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=[*MODELS], metavar="NAME")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--out", type=Path, default=DEMOS, help="where checkpoints go")
    parser.add_argument("--evaluate-only", action="store_true", help="of what lies in OUT")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    corpus = read_corpus(HELD_OUT_PERCENT)
    tokenizer = train_tokenizer(corpus.train, COMMON["vocab_size"])
    tokenizer.model_max_length = COMMON["max_position_embeddings"]
    for name in asked.names:
        settings, began, out = Settings(asked.steps), cpu_seconds(), asked.out / name
        if asked.evaluate_only:
            kept = json.loads((out / RECORD).read_text())
            settings, seconds = Settings(**kept["settings"]), kept["cpu_seconds"]
        else:
            with tempfile.TemporaryDirectory(dir=asked.out) as temporary:
                folder = Path(temporary) / "checkpoint"
                train_checkpoint(MODELS[name], corpus, tokenizer, settings, folder)
                replace_folder(folder, out)
            seconds = cpu_seconds() - began
        evaluate_checkpoint(name, corpus, settings, seconds, out)


if __name__ == "__main__":
    main()
