"""Measure a small model of a research system and write its card. Used by train_qat.py and
train_research_demos.py, beside which it lies."""

import json
import math
import platform
import resource
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from demo_card import RECORD, count_bytes, unigram_log_probabilities, whole_windows
from torch import Tensor
from torch.nn import functional as F
from train_demo import Corpus, count_text_bytes, encode
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ane_moe.files import write_text

WINDOW = 256  # tokens; a held-out token is scored with at most this much context
WINDOWS_AT_ONCE = 16
PROMPT, SAMPLE_TOKENS = "class Reader:\n    def __init__(self", 40


@dataclass(frozen=True)
class Quality:
    """Held-out measurements of a model, and of token frequencies. Perplexities are per token."""

    tokens: int
    perplexity: float
    bits_per_byte: float
    unigram_perplexity: float
    unigram_bits_per_byte: float


@dataclass(frozen=True)
class Record:
    """All that a card says but what is the same for every training of the demo."""

    settings: dict[str, float]
    python: str
    torch: str
    transformers: str
    train_bytes: int
    train_tokens: int
    parameters: int
    cpu_seconds: float
    quality: Quality
    sample: str
    conversions: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Card:
    """What a card says of a demo whatever its training gave: what it is, and how it is built."""

    name: str
    about: str
    facts: Mapping[str, str]
    script: str


def record_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    corpus: Corpus,
    settings: Any,
    cpu_seconds: float,
    conversions: Sequence[Mapping[str, Any]] = (),
) -> Record:
    """Of `model` in fp32, trained on the corpus by the dataclass `settings`."""
    train, held_out = encode(tokenizer, corpus.train), encode(tokenizer, corpus.held_out)
    return Record(
        settings=asdict(settings),
        python=platform.python_version(),
        torch=torch.__version__.split("+")[0],
        transformers=transformers.__version__,
        train_bytes=count_text_bytes(corpus.train),
        train_tokens=len(train),
        parameters=model.num_parameters(),
        cpu_seconds=cpu_seconds,
        quality=quality(model.eval(), tokenizer, train, held_out),
        sample=continued(model, tokenizer, PROMPT),
        conversions=conversions,
    )


@torch.inference_mode()
def quality(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, train: Tensor, held_out: Tensor
) -> Quality:
    windows, lost = whole_windows(held_out, WINDOW), []
    targets = windows[:, 1:].flatten()
    for batch in windows.split(WINDOWS_AT_ONCE):
        predicted = model(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1)
        lost.append(F.cross_entropy(predicted, batch[:, 1:].flatten(), reduction="none").double())
    nats = float(torch.cat(lost).mean())
    frequencies = unigram_log_probabilities(train, model.config.vocab_size)
    unigram = -float(frequencies[targets].mean())
    bits = len(targets) / count_bytes(tokenizer, targets) / math.log(2)
    return Quality(len(targets), math.exp(nats), bits * nats, math.exp(unigram), bits * unigram)


@torch.inference_mode()
def continued(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """The prompt and the likeliest tokens after it, each of a pass over all before it."""
    ids = tokenizer(prompt)["input_ids"]
    for _ in range(SAMPLE_TOKENS):
        ids.append(
            int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        )
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def cpu_seconds() -> float:
    """What this process has taken until now, the system's part included."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


TEXT = """\
# The ane-moe demo model `{name}`

{about}

It is small enough to ship with the package and really trained, though briefly: it serves to exercise
conversion, verification and generation, nothing else. The standard library it learnt from is under the
Python Software Foundation licence.

| | |
|---|---|
{facts}
| parameters | {parameters:,}, weights saved in float16 |
| corpus | standard library of CPython {python}: sources without tests and generated tables |
| training text | {train_bytes:,} bytes, {train_tokens:,} tokens |
| training | {steps} AdamW steps of {batch} windows of {context} tokens, learning rate {rate:g}, \
{cpu_seconds:.0f} CPU seconds |
| made with | torch {torch}, transformers {transformers}, `scripts/{script}` |

## Held-out quality

Measured on the saved weights, with float32 arithmetic, on {quality.tokens:,} tokens of files never trained
on, in windows of {window}.

| model | perplexity per token | bits per byte |
|---|---:|---:|
| this model | {quality.perplexity:.2f} | {quality.bits_per_byte:.3f} |
| unigram: token frequencies of the training text, plus one | {quality.unigram_perplexity:.2f} \
| {quality.unigram_bits_per_byte:.3f} |
{conversions}
## Sample

A prompt and the {sample_tokens} likeliest tokens after it. So small a model soon repeats itself.

```text
{sample}
```
"""


def render_card(card: Card, record: Record, conversions: str) -> str:
    """Fill the card in from the record alone; `conversions` is a section that some cards have."""
    settings = record.settings
    return TEXT.format(
        **{**vars(record), "sample": record.sample.rstrip(), "conversions": conversions},
        name=card.name,
        about=card.about,
        script=card.script,
        facts="\n".join(f"| {name} | {fact} |" for name, fact in card.facts.items()),
        steps=settings["steps"],
        batch=settings["batch"],
        context=settings["context"],
        rate=settings["learning_rate"],
        window=WINDOW,
        sample_tokens=SAMPLE_TOKENS,
    )


def write_record(card: Card, record: Record, folder: Path, conversions: str = "") -> None:
    """Write the record and the card made from it into the checkpoint folder."""
    write_text(folder / RECORD, json.dumps(asdict(record), indent=2) + "\n")
    write_text(folder / "README.md", render_card(card, record, conversions))
