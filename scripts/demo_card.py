"""Measure the demo model and write its card. Used by train_demo.py, beside which it lies."""

import itertools
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from ane_moe.files import write_text

RECORD = "training.json"  # the record as data, kept in the checkpoint beside the card
WINDOW = 512  # tokens; a held-out token is scored with at most this much context
SAMPLE_PROMPTS = ("def ", "import os\n", "class Reader:\n    def __init__(self")
SAMPLE_TOKENS = 60
SAMPLERS: dict[str, dict[str, Any]] = {  # how the card words it -> options of HF's `generate`
    "greedy": {"do_sample": False},
    "drawn at temperature 0.7 from the 40 likeliest, seed 0": {
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 40,
    },
}


@dataclass(frozen=True)
class LayerRouting:
    """How one layer's router behaves on the held-out tokens. Entropies in nats."""

    token_entropy: float  # mean over tokens of the entropy of the full softmax
    mean_entropy: float  # entropy of the softmax averaged over tokens
    usage_entropy: float  # entropy of `usage`
    top_k_mass: float  # mean softmax probability of the selected experts together
    usage: list[float]  # share of the selections that went to each expert; sums to 1


@dataclass(frozen=True)
class Sample:
    """A prompt with the model's continuation."""

    prompt: str
    sampler: str
    text: str


@dataclass(frozen=True)
class Metrics:
    """Held-out measurements. Perplexities are per token."""

    held_out_tokens: int
    perplexity: float
    bits_per_byte: float
    full_context_perplexity: float  # in windows as long as the model's context
    unigram_perplexity: float
    unigram_bits_per_byte: float
    routing: list[LayerRouting]
    samples: list[Sample]


@dataclass(frozen=True)
class Record:
    """All that the card says."""

    settings: dict[str, float]
    python: str
    torch: str
    transformers: str
    train_files: int
    train_bytes: int
    train_tokens: int
    held_out_files: int
    held_out_bytes: int
    parameters: int
    metrics: Metrics


@torch.inference_mode()
def measure(
    model: Qwen3MoeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    train_ids: Tensor,
    held_out_ids: Tensor,
) -> Metrics:
    """Measure `model` (float32) on held-out ids against a unigram model of the training ids."""
    model.eval()
    losses, router_logits = score(model, held_out_ids, WINDOW)
    long_losses, _ = score(model, held_out_ids, model.config.max_position_embeddings)
    targets = whole_windows(held_out_ids, WINDOW)[:, 1:].flatten()
    nats = losses.mean().item()
    unigram_nats = (
        -unigram_log_probabilities(train_ids, model.config.vocab_size)[targets].mean().item()
    )
    tokens_per_byte = len(targets) / count_bytes(tokenizer, targets)
    return Metrics(
        held_out_tokens=len(targets),
        perplexity=math.exp(nats),
        bits_per_byte=nats / math.log(2) * tokens_per_byte,
        full_context_perplexity=math.exp(long_losses.mean().item()),
        unigram_perplexity=math.exp(unigram_nats),
        unigram_bits_per_byte=unigram_nats / math.log(2) * tokens_per_byte,
        routing=[measure_routing(logits, model.config) for logits in router_logits],
        samples=[
            draw(model, tokenizer, *pair) for pair in itertools.product(SAMPLE_PROMPTS, SAMPLERS)
        ],
    )


def whole_windows(ids: Tensor, window: int) -> Tensor:
    """Cut ids [tokens] into [count, window], leaving the rest out."""
    return ids[: len(ids) // window * window].view(-1, window)


def score(model: Qwen3MoeForCausalLM, ids: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Return the nats of each token but a window's first, and router logits [layers, tokens,
    experts]."""
    losses, router_logits = [], []
    for batch in whole_windows(ids, window).split(4096 // window):
        output = model(input_ids=batch, output_router_logits=True, use_cache=False)
        predicted, targets = output.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()
        losses.append(F.cross_entropy(predicted, targets, reduction="none").double())
        router_logits.append(torch.stack(output.router_logits))
    return torch.cat(losses), torch.cat(router_logits, dim=1)


def unigram_log_probabilities(train_ids: Tensor, vocabulary: int) -> Tensor:
    """Log probabilities [vocabulary] of a unigram model with add-one smoothing."""
    counts = torch.bincount(train_ids, minlength=vocabulary).double() + 1
    return (counts / counts.sum()).log()


def count_bytes(tokenizer: PreTrainedTokenizerFast, ids: Tensor) -> int:
    """Bytes of text that the ids stand for: a byte-level token spells each byte as one
    character."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    lengths = [0 if token in tokenizer.all_special_tokens else len(token) for token in tokens]
    return int(torch.tensor(lengths)[ids].sum())


def measure_routing(logits: Tensor, config: Qwen3MoeConfig) -> LayerRouting:
    """Summarise one layer's router logits [tokens, experts]."""
    probabilities = logits.double().softmax(-1)
    top = probabilities.topk(config.num_experts_per_tok, dim=-1)
    usage = torch.bincount(top.indices.flatten(), minlength=config.num_experts).double()
    usage /= usage.sum()
    return LayerRouting(
        token_entropy=torch.special.entr(probabilities).sum(-1).mean().item(),
        mean_entropy=torch.special.entr(probabilities.mean(0)).sum().item(),
        usage_entropy=torch.special.entr(usage).sum().item(),
        top_k_mass=top.values.sum(-1).mean().item(),
        usage=usage.tolist(),
    )


def draw(model: Any, tokenizer: PreTrainedTokenizerFast, prompt: str, sampler: str) -> Sample:
    """Continue `prompt` by SAMPLE_TOKENS tokens."""
    torch.manual_seed(0)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, **SAMPLERS[sampler], max_new_tokens=SAMPLE_TOKENS)
    return Sample(prompt, sampler, str(tokenizer.decode(output[0], skip_special_tokens=True)))


CARD = """\
# The ane-moe demo model

A tiny mixture-of-experts language model of Python source code, small enough to ship with the package and
really trained, so that its routing is real. It serves to exercise conversion and verification, nothing
else. The standard library it learnt from is under the Python Software Foundation licence.

| | |
|---|---|
| architecture | Hugging Face `qwen3_moe`, {parameters:,} parameters, weights saved in float16 |
| layers | 4, d_model 128, 4 query and 2 key/value heads of 32, tied embedding |
| experts | 8 per layer, top-2, SwiGLU 128 wide, `norm_topk_prob` true |
| tokenizer | byte-level BPE, {settings[vocabulary]} tokens, trained on the training text |
| context | {settings[long_context]} tokens |
| corpus | standard library of CPython {python}: sources without tests and generated tables |
| training text | {train_files} files, {train_bytes:,} bytes, {train_tokens:,} tokens |
| held-out text | {held_out_files} files never trained on, {held_out_bytes:,} bytes |
| training | {settings[steps]} AdamW steps of {settings[batch_tokens]} tokens ({passes:.1f} passes) |
| windows | {settings[context]} tokens; in the last {settings[long_fraction]:.0%} of the steps \
{settings[long_context]} |
| learning rate | {settings[learning_rate]:g} after {settings[warmup_steps]} steps of warm-up, then a cosine |
| expert balance | HF's auxiliary loss per layer, times {settings[balance_coefficient]:g} |
| made with | torch {torch}, transformers {transformers}, `scripts/train_demo.py` |

## Held-out quality

Measured on the saved weights, with float32 arithmetic, on {metrics.held_out_tokens:,} tokens in windows
of {window}: on average a token is predicted from half as many. In windows of {settings[long_context]} the perplexity
is {metrics.full_context_perplexity:.2f}.

| model | perplexity per token | bits per byte |
|---|---:|---:|
| this model | {metrics.perplexity:.2f} | {metrics.bits_per_byte:.3f} |
| unigram: token frequencies of the training text, plus one | {metrics.unigram_perplexity:.2f} \
| {metrics.unigram_bits_per_byte:.3f} |
| uniform over the vocabulary | {settings[vocabulary]} | {uniform_bits_per_byte:.3f} |

## Routing

On the same tokens, entropies in nats. Uniform routing would show ln 8 = {uniform_entropy:.3f} and a
top-2 mass of 0.25.

* per token: mean over tokens of the entropy of the router's full softmax;
* averaged: entropy of the softmax averaged over tokens (how evenly the router spreads in all);
* usage: share of the selections that each expert received, and its entropy;
* top-2 mass: softmax probability of the two selected experts together, before renormalisation.

| layer | per token | averaged | usage | top-2 mass | usage of experts 0-7 (%) |
|---:|---:|---:|---:|---:|---|
{routing}

## Samples

Each is a prompt and {sample_tokens} more tokens. Greedy decoding of so small a model soon repeats itself,
and a bare word without any line before it is unlike all text it was trained on.

{samples}
"""


def render_card(record: Record) -> str:
    """Fill the card in from the record alone."""
    settings, metrics = record.settings, record.metrics
    bits_per_nat_and_byte = metrics.bits_per_byte / math.log(metrics.perplexity)
    return CARD.format(
        **vars(record),
        passes=settings["steps"] * settings["batch_tokens"] / record.train_tokens,
        window=WINDOW,
        uniform_bits_per_byte=math.log(settings["vocabulary"]) * bits_per_nat_and_byte,
        uniform_entropy=math.log(8),
        routing="\n".join(
            routing_row(layer, routing) for layer, routing in enumerate(metrics.routing)
        ),
        sample_tokens=SAMPLE_TOKENS,
        samples="\n\n".join(sample_section(sample) for sample in metrics.samples),
    )


def routing_row(layer: int, routing: LayerRouting) -> str:
    """Render one layer's line of the card's table."""
    measures = (
        routing.token_entropy,
        routing.mean_entropy,
        routing.usage_entropy,
        routing.top_k_mass,
    )
    usage = " ".join(f"{100 * share:.1f}" for share in routing.usage)
    return f"| {layer} | " + " | ".join(f"{measure:.3f}" for measure in measures) + f" | {usage} |"


def sample_section(sample: Sample) -> str:
    """Render one sample; the prompt is written as Python would."""
    return f"`{sample.prompt!r}`, {sample.sampler}:\n\n```text\n{sample.text.rstrip()}\n```"


def write_record(record: Record, folder: Path) -> None:
    """Write the record and the card made from it into the checkpoint folder."""
    write_text(folder / RECORD, json.dumps(asdict(record), indent=2) + "\n")
    write_text(folder / "README.md", render_card(record))
