"""Train the built-in demo model: a tiny Qwen3-MoE language model of Python source code.

    python scripts/train_demo.py                   # corpus, tokenizer, training, measurement, card
    python scripts/train_demo.py --evaluate-only   # measure the packaged weights again, rewrite the
    card

The corpus is the standard library of the Python that runs this script, so that any machine has it.
Every figure in the card is measured on the saved float16 weights, with the arithmetic in float32.
Seeds fix all choices; the last bits still depend on the machine and on the number of threads.
"""

import hashlib
import json
import platform
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from demo_card import RECORD, Record, measure, render_card, write_record
from demo_training import (
    Descent,
    balance_loss,
    replace_folder,
    save_checkpoint,
    say,
    training_parser,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

CHECKPOINT = Path(__file__).resolve().parents[1] / "ane_moe" / "demo" / "checkpoint"
END_OF_TEXT = "<|endoftext|>"

# Left out: test data, generated tables, and files that hold paths of the machine that built Python.
EXCLUDED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "idle_test",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}
EXCLUDED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars")

ARCHITECTURE: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "intermediate_size": 256,  # of dense layers; this model has none
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,  # HF's 0.02 is for widths in the thousands
}


@dataclass(frozen=True)
class Settings:
    """What the training depends on besides the corpus. Lengths are in tokens."""

    steps: int = 3400
    batch_tokens: int = 2048
    context: int = 256  # of most steps: attention is cheap, so more text is seen per second
    # Of the last steps, so that every position the model claims was trained.
    long_context: int = 2048
    long_fraction: float = 0.1
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    balance_coefficient: float = 0.01
    vocabulary: int = 4096
    held_out_percent: int = 5
    seed: int = 0


@dataclass(frozen=True)
class Corpus:
    """Standard-library sources, one string per file, split by file."""

    train: list[str]
    held_out: list[str]


def count_text_bytes(texts: list[str]) -> int:
    """Bytes of all texts in UTF-8."""
    return sum(len(text.encode()) for text in texts)


def source_files(root: Path) -> list[Path]:
    """List the Python files under `root` that are worth learning from, in a fixed order."""
    found = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = (
        path
        for path in found
        if not EXCLUDED_FOLDERS & set(path.parts) and not path.name.startswith(EXCLUDED_PREFIXES)
    )
    return sorted(kept, key=lambda path: path.as_posix())


def is_held_out(path: Path, percent: int) -> bool:
    """Decide by a hash of the relative path: stable across machines, and one file is on one side
    only."""
    digest = hashlib.sha256(path.as_posix().encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < percent


def read_corpus(held_out_percent: int) -> Corpus:
    """Read the standard library of the running interpreter."""
    root = Path(sysconfig.get_paths()["stdlib"])
    corpus = Corpus([], [])
    for path in source_files(root):
        text = (root / path).read_text(encoding="utf-8", errors="ignore")
        (corpus.held_out if is_held_out(path, held_out_percent) else corpus.train).append(text)
    return corpus


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: any text round-trips, none is unknown."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=Settings.long_context,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Join all texts into one stream of token ids, each text begun by the end-of-text token."""
    ids: list[int] = []
    for encoded in tokenizer(texts, verbose=False)["input_ids"]:
        ids.append(tokenizer.eos_token_id)
        ids.extend(encoded)
    return torch.tensor(ids)


def build_model(settings: Settings, end_of_text: int) -> Qwen3MoeForCausalLM:
    """Build the untrained model; `eager` experts are the quickest form on a CPU at these sizes."""
    config = Qwen3MoeConfig(
        **ARCHITECTURE,
        vocab_size=settings.vocabulary,
        max_position_embeddings=settings.long_context,
        router_aux_loss_coef=settings.balance_coefficient,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
        bos_token_id=None,
    )
    return Qwen3MoeForCausalLM._from_config(
        config, attn_implementation="sdpa", experts_implementation="eager", dtype=torch.float32
    )


def batches(stream: Tensor, settings: Settings) -> Iterator[Tensor]:
    """Yield `steps` batches [batch, context]; each pass over the stream is cut at a new offset."""
    generator = torch.Generator().manual_seed(settings.seed)
    long_steps = round(settings.steps * settings.long_fraction)
    stages = (
        (settings.steps - long_steps, settings.context),
        (long_steps, settings.long_context),
    )
    for steps, context in stages:
        windows = shuffled_windows(stream, context, generator)
        for _ in range(steps):
            yield torch.stack([next(windows) for _ in range(settings.batch_tokens // context)])


def shuffled_windows(stream: Tensor, context: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield windows [context] without end: every token once per pass, in a new order each pass."""
    while True:
        offset = int(torch.randint(context, (1,), generator=generator))
        count = (len(stream) - offset) // context
        windows = stream[offset : offset + count * context].view(count, context)
        yield from windows[torch.randperm(count, generator=generator)]


def train(model: Qwen3MoeForCausalLM, stream: Tensor, settings: Settings) -> None:
    """Train `model` in place on the token stream, reporting to stderr."""
    descent = Descent(model, settings)
    experts, top_k = model.config.num_experts, model.config.num_experts_per_tok
    started = time.monotonic()
    model.train()
    for step, batch in enumerate(batches(stream, settings), start=1):
        output = model(input_ids=batch, output_router_logits=True, use_cache=False)
        prediction = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        balance = balance_loss(output.router_logits, experts, top_k)
        descent.step(prediction + settings.balance_coefficient * balance)
        if step % 50 == 0 or step == settings.steps:
            elapsed = time.monotonic() - started
            say(
                f"step {step}/{settings.steps}  loss {prediction.item():.3f}  balance "
                f"{balance.item():.3f}  "
                f"{step * settings.batch_tokens / elapsed:.0f} tok/s  "
                f"{elapsed * (settings.steps - step) / step:.0f} s left"
            )


def read_settings(checkpoint: Path) -> Settings:
    """Return the settings that a checkpoint was trained with, if its corpus is the one at hand."""
    record = json.loads((checkpoint / RECORD).read_text())
    if record["python"] != platform.python_version():
        sys.exit(
            f"the corpus was Python {record['python']}'s library; run this with that version to "
            f"measure again"
        )
    return Settings(**record["settings"])


def train_checkpoint(corpus: Corpus, settings: Settings, folder: Path) -> None:
    """Train tokenizer and model and save them in `folder`, the weights in float16."""
    tokenizer = train_tokenizer(corpus.train, settings.vocabulary)
    model = build_model(settings, tokenizer.eos_token_id)
    stream = encode(tokenizer, corpus.train)
    say(f"{model.num_parameters():,} parameters, {len(stream):,} tokens of training text")
    train(model, stream, settings)
    model.generation_config.do_sample = False
    save_checkpoint(model, tokenizer, folder)


def evaluate_checkpoint(corpus: Corpus, settings: Settings, folder: Path) -> Record:
    """Measure the checkpoint as saved in `folder` and write its record and card there."""
    model = Qwen3MoeForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    train_ids = encode(tokenizer, corpus.train)
    record = Record(
        settings=asdict(settings),
        python=platform.python_version(),
        torch=torch.__version__.split("+")[0],
        transformers=transformers.__version__,
        train_files=len(corpus.train),
        train_bytes=count_text_bytes(corpus.train),
        train_tokens=len(train_ids),
        held_out_files=len(corpus.held_out),
        held_out_bytes=count_text_bytes(corpus.held_out),
        parameters=model.num_parameters(),
        metrics=measure(model, tokenizer, train_ids, encode(tokenizer, corpus.held_out)),
    )
    write_record(record, folder)
    return record


def main() -> None:
    """Train and measure, or only measure, and report the outcome on stderr."""
    arguments = vars(training_parser(__doc__, CHECKPOINT, Settings()).parse_args())
    out: Path = arguments.pop("out")
    evaluate_only: bool = arguments.pop("evaluate_only")
    torch.set_num_threads(arguments.pop("threads"))
    settings = read_settings(out) if evaluate_only else Settings(**arguments)
    torch.manual_seed(settings.seed)
    corpus = read_corpus(settings.held_out_percent)
    say(f"{len(corpus.train)} training files, {len(corpus.held_out)} held out")
    if evaluate_only:
        record = evaluate_checkpoint(corpus, settings, out)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
            folder = Path(temporary) / "checkpoint"
            train_checkpoint(corpus, settings, folder)
            record = evaluate_checkpoint(corpus, settings, folder)
            replace_folder(folder, out)
    say(render_card(record))


if __name__ == "__main__":
    main()
