"""What weight formats cost where each token goes to one expert, or two, and not to four or more.

    scripts/measure_top_k.py WORK [--models NAME ...] [--steps 1000] [--seed 0] [--train-only]
                             [--write]

Tiny byte-level language models of Python source code (the text of scripts/train_demo.py) are
trained, alike but for the number of experts that a token chooses, and kept in WORK: a quarter of
an hour on one core. Each is then converted in every format and run by the reference runtime over
passages that it never saw, beside the fp32 model in memory: ten minutes more. `--write` puts the
table into docs/compression.md.

`router too`: the router's matrices are rounded to the format as well, before the conversion (which
keeps them fp16). `outliers xN`: the same function, but three of the channels that experts and
routers read are made N times smaller, and their columns of the weights N times larger.
"""

import argparse
import math
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_training import balance_loss, build_optimizer, learning_rate_factor, say
from doc_page import PagePart
from torch import Tensor, nn
from torch.nn import functional as F
from train_demo import Settings, read_corpus, shuffled_windows
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ane_moe.conversion.pipeline import convert
from ane_moe.conversion.plan import ConvertOptions
from ane_moe.formats.expand import expand
from ane_moe.formats.recipe import find_format, find_recipe
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from ane_moe.manifest import read_manifest

COMMON: dict[str, Any] = {
    "vocab_size": 256,  # bytes
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 256,
    "moe_intermediate_size": 96,
    "num_experts": 8,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,  # HF's 0.02 is for widths in the thousands
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
ZAYA = {
    "router_hidden_size": 32,
    "layer_types": ["hybrid"] * 4,
    "rope_parameters": {"hybrid": ROPE},
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "zaya top-1": ("zaya", {**ZAYA, "num_experts_per_tok": 1}),
    "qwen3_moe top-1": ("qwen3_moe", {"num_experts_per_tok": 1, "norm_topk_prob": False}),
    "qwen3_moe top-2": ("qwen3_moe", {"num_experts_per_tok": 2, "norm_topk_prob": True}),
    "qwen3_moe top-4": ("qwen3_moe", {"num_experts_per_tok": 4, "norm_topk_prob": True}),
}
FORMATS = [
    "fp16",
    "int8",
    "lut8",
    "lut8-tensor",
    "lut6",
    "lut4",
    "int8, router too",
    "lut8, router too",
    "int8, outliers x16",
    "lut8, outliers x16",
    "int8, router too, outliers x16",
    "lut8, router too, outliers x16",
    "int8, outliers x64",
    "lut8, outliers x64",
]
HEAD = (
    "| model | format | bits of experts | bits a byte | change | mean KL | top-1 | rerouted "
    "| same | whole |"
)
CONTEXT = 256  # tokens: of training, of a passage, of a prompt with its continuation
BATCH = 8
PASSAGES = 48
PROMPTS = 20
PROMPT = 64
LEAST_WEIGHT = 1e-3  # of an expert, to say that a token was rerouted
OUTLIERS = [7, 40, 81]  # channels
BALANCE_LOSS = 0.01  # times the balance loss of Hugging Face's Qwen3-MoE
BALANCE_STEP = 2e-3  # by which ZAYA's biases go up or down, without a gradient
Routing = list[tuple[Tensor, Tensor]]  # of each layer: weights and choices [tokens,k]


# -- training -------------------------------------------------------------------------------------


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """The untrained model."""
    family, fields = MODELS[name]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **COMMON, **fields)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("qk_norm.temp"):
            nn.init.ones_(parameter)  # at HF's zero, attention begins as a mean
    for gate in gates(model):
        if hasattr(gate, "balancing_biases"):
            gate.balancing_biases.zero_()
    return model


def gates(model: PreTrainedModel) -> list[nn.Module]:
    """The routers, by layer: each returns scores, weights, the chosen."""
    return [layer.mlp.gate for layer in model.model.layers]


def heard(model: PreTrainedModel, into: Routing) -> list[Any]:
    """Let every router leave its weights and choices in `into`. Returns the hooks."""

    def keep(_: nn.Module, __: Any, output: tuple[Tensor, ...]) -> None:
        into.append((output[1].detach().flatten(0, -2), output[2].detach().flatten(0, -2)))

    return [gate.register_forward_hook(keep) for gate in gates(model)]


def shares(weights: Tensor, chosen: Tensor, experts: int) -> Tensor:
    """What share of the choices each expert got, and last the class that computes nothing."""
    classes = torch.where(weights > 0, chosen, experts).flatten()
    return torch.bincount(classes, minlength=experts + 1) / len(classes)


def balance_biases(model: PreTrainedModel, routing: Routing, step: float) -> None:
    """Raise the biases of classes that were chosen too rarely, lower the others'."""
    for gate, (weights, chosen) in zip(gates(model), routing, strict=True):
        share = shares(weights, chosen, gate.num_experts)
        gate.balancing_biases += step * torch.sign(1 / len(share) - share)


def train(name: str, stream: Tensor, steps: int, seed: int) -> tuple[PreTrainedModel, float]:
    """The trained model, and its mean loss over the last 50 steps in bits a byte."""
    model, settings = build(name, seed).train(), Settings(steps=steps)
    biased = hasattr(gates(model)[0], "balancing_biases")
    routing: Routing = []
    hooks = heard(model, routing)
    optimizer = build_optimizer(model, settings)
    windows = shuffled_windows(stream, CONTEXT, torch.Generator().manual_seed(seed))
    losses, started = [], time.monotonic()
    for step in range(steps):
        factor = learning_rate_factor(step, settings)
        for group in optimizer.param_groups:
            group["lr"] = factor * settings.learning_rate
        batch = torch.stack([next(windows) for _ in range(BATCH)]).long()
        routing.clear()
        output = model(input_ids=batch, use_cache=False, output_router_logits=not biased)
        loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        losses.append(loss.item() / math.log(2))
        if not biased:
            loss = loss + BALANCE_LOSS * balance_loss(
                output.router_logits, model.config.num_experts, model.config.num_experts_per_tok
            )
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if biased:
            balance_biases(model, routing, factor * BALANCE_STEP)
        if (step + 1) % 50 == 0:
            least = min(
                shares(w, c, model.config.num_experts)[: model.config.num_experts].min().item()
                for w, c in routing
            )
            say(
                f"{name}  {step + 1}/{steps}  {np.mean(losses[-50:]):.3f} bits a byte  "
                f"least share {least:.3f}  {time.monotonic() - started:.0f} s"
            )
    for hook in hooks:
        hook.remove()
    return model.eval(), float(np.mean(losses[-50:]))


@dataclass(frozen=True)
class Run:
    """Where trained models are kept, how long each is trained, and from which seed."""

    work: Path
    steps: int
    seed: int


def trained(name: str, run: Run) -> tuple[PreTrainedModel, float]:
    """The model as kept, trained first where it is not, and its loss (see `train`)."""
    kept = run.work / f"{name.replace(' ', '_')}_{run.steps}_{run.seed}.pt"
    if not kept.exists():
        corpus = b"".join(text.encode() for text in read_corpus(Settings.held_out_percent).train)
        stream = torch.from_numpy(np.frombuffer(corpus, np.uint8).copy())
        model, loss = train(name, stream, run.steps, run.seed)
        torch.save({"state": model.state_dict(), "loss": loss}, kept)
    stored, model = torch.load(kept), build(name).eval()
    model.load_state_dict(stored["state"])
    return model, stored["loss"]


# -- what is converted ----------------------------------------------------------------------------


def with_outliers(model: PreTrainedModel, factor: int) -> PreTrainedModel:
    """The same function: some channels that experts and routers read, small before their weights.

    What is divided out of the norm comes back in the columns of the matrices that read it.
    """
    for layer in model.model.layers:
        readers = [layer.mlp.experts.gate_up_proj]
        width = model.config.hidden_size
        readers.append(next(p for p in layer.mlp.gate.parameters() if p.shape[-1] == width))
        with torch.no_grad():
            layer.post_attention_layernorm.weight[OUTLIERS] /= factor
            for matrix in readers:
                matrix[..., OUTLIERS] *= factor
    return model


def with_rounded_routers(model: PreTrainedModel, format_name: str) -> PreTrainedModel:
    """Every matrix of the routers replaced by what the format makes of it."""
    form = find_format(find_recipe(format_name).name)
    for gate in gates(model):
        for parameter in gate.parameters():
            if parameter.ndim == 2:
                encoded = form.encode(parameter.detach().half().numpy())
                assert encoded is not None
                parameter.data = torch.from_numpy(expand(encoded).astype(np.float32))
    return model


def save(model: PreTrainedModel, folder: Path) -> Path:
    """A checkpoint for `convert`."""
    model.save_pretrained(folder)
    return folder


# -- measurement ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heard:
    """What one model, or its conversion, said of the text.

    logits `[passages,T,256]`, weights of experts `[passages,layers,experts,T]`, and for each
    prompt the scores' argmax over the fp32 model's own continuation `[prompts,N]`.
    """

    logits: Tensor
    weights: np.ndarray
    continued: np.ndarray


@dataclass(frozen=True)
class Row:
    """One line of the table. `rerouted`: share of tokens that got another set of experts in any
    layer. `same`: mean tokens of a greedy continuation until it differs; `whole`: how many never
    do."""

    model: str
    format: str
    bits: float
    bits_per_byte: float
    change: float
    kl: float
    top1: float
    rerouted: float
    same: float
    whole: int


def passages(files: list[str]) -> list[list[int]]:
    """From the middle of each held-out file that is long enough, then from a quarter, and so on."""
    texts = [text.encode() for text in files]
    long = [text for text in texts if len(text) >= 8 * CONTEXT]
    places = [(text, place) for place in (1 / 2, 1 / 4, 3 / 4, 1 / 8) for text in long]
    return [list(text[int(place * len(text)) :][:CONTEXT]) for text, place in places[:PASSAGES]]


@torch.no_grad()
def continuations(model: PreTrainedModel, prompts: Tensor) -> Tensor:
    """Prompts `[P,n]` and what the model says most likely follows, `[P,CONTEXT]`."""
    ids, cache, new = prompts, None, prompts
    while ids.shape[1] < CONTEXT:
        output = model(input_ids=new, past_key_values=cache, use_cache=True)
        cache, new = output.past_key_values, output.logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, new], 1)
    return ids


@torch.no_grad()
def hear_model(model: PreTrainedModel, text: Tensor, continued: Tensor) -> Heard:
    """Hugging Face's model in fp32."""
    experts, routing = model.config.num_experts, []
    hooks = heard(model, routing)
    logits = model(input_ids=text, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    layers = []
    for weights, chosen in routing:
        weights, chosen = (part.view(*text.shape, -1) for part in (weights, chosen))
        table = torch.zeros(*text.shape, experts).scatter_add_(2, chosen, weights)
        layers.append(table.mT.numpy())
    scores = model(input_ids=continued, use_cache=False).logits
    return Heard(logits, np.stack(layers, 1), scores.argmax(-1).numpy())


def hear_shards(folder: Path, text: Tensor, continued: Tensor, experts: int) -> Heard:
    """The conversion in `folder`, by the reference runtime's prefill functions."""
    session = Session(load_shards(folder, "reference"))
    logits, weights, scores = [], [], []
    for ids in text.tolist():
        session.reset()
        logits.append(torch.from_numpy(session.prefill_logits(ids)))
        slots = [session.slot(f"gates.{layer}")[:experts] for layer in range(4)]
        weights.append(np.stack(slots).astype(np.float32))
    for ids in continued.tolist():
        session.reset()
        scores.append(session.prefill_logits(ids).argmax(-1))
    return Heard(torch.stack(logits), np.stack(weights), np.stack(scores))


def bits_per_byte(logits: Tensor, text: Tensor) -> float:
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())
    return loss.item() / math.log(2)


def same_length(ids: np.ndarray, continued: np.ndarray) -> np.ndarray:
    """For each prompt how many tokens of the continuation `ids` hold before another is said."""
    said, wanted = continued[:, PROMPT - 1 : -1], ids[:, PROMPT:]
    wrong = np.pad(said != wanted, ((0, 0), (0, 1)), constant_values=True)
    return wrong.argmax(1)


def rerouted(expected: np.ndarray, got: np.ndarray) -> float:
    """Share of tokens for which one of two runs chose an expert in any layer and the other did not.

    Weights that hardly count are left out: biases may choose an expert of nearly none.
    """
    other = ((expected > 0) != (got > 0)) & (np.maximum(expected, got) >= LEAST_WEIGHT)
    return float(other.any((1, 2)).mean())


def compare(
    name: str, form: str, bits: float, fp32: Heard, found: Heard, text: Tensor, continued: Tensor
) -> Row:
    """A line of the table: a conversion beside the fp32 model."""
    expected, got = fp32.logits.log_softmax(-1), found.logits.log_softmax(-1)
    kl = F.kl_div(got, expected, log_target=True, reduction="none").sum(-1)
    same = same_length(continued.numpy(), found.continued)
    score = bits_per_byte(found.logits, text)
    return Row(
        name,
        form,
        bits,
        score,
        score - bits_per_byte(fp32.logits, text),
        kl.mean().item(),
        (expected.argmax(-1) == got.argmax(-1)).float().mean().item(),
        rerouted(fp32.weights, found.weights),
        float(same.mean()),
        int((same == CONTEXT - PROMPT).sum()),
    )


def bits_of_experts(folder: Path) -> float:
    """Bits of an expert's weight, scales and palettes included."""
    roles = read_manifest(folder).compression.items()
    tables = [facts for role, facts in roles if role.startswith("experts")]
    weights = sum(facts["weights"] for facts in tables)
    return 8 * sum(facts["bytes"] for facts in tables) / weights if weights else 16.0


def measure(name: str, run: Run, text: Tensor) -> Iterator[Row]:
    """Every conversion of one trained model."""
    model, _ = trained(name, run)
    continued = continuations(model, text[:PROMPTS, :PROMPT])
    fp32 = hear_model(model, text, continued)
    for form in FORMATS:
        base, *extras = form.split(", ")
        model, _ = trained(name, run)
        for extra in extras[::-1]:  # outliers come before what is rounded
            model = (
                with_rounded_routers(model, base)
                if extra == "router too"
                else with_outliers(model, int(extra.removeprefix("outliers x")))
            )
        checkpoint, out = save(model, run.work / "checkpoint"), run.work / "shards"
        options = ConvertOptions(context=CONTEXT, prefill=CONTEXT, recipe=find_recipe(base))
        convert(checkpoint, out, options)
        found = hear_shards(out, text, continued, model.config.num_experts)
        yield compare(name, form, bits_of_experts(out), fp32, found, text, continued)
        shutil.rmtree(checkpoint)
        shutil.rmtree(out)


def line(row: Row) -> str:
    base, comma, extra = row.format.partition(",")
    return (
        f"| {row.model} | `{base}`{comma}{extra} "
        f"| {row.bits:.2f} | {row.bits_per_byte:.4f} | {row.change:+.5f} | {row.kl:.2e} "
        f"| {row.top1:.2%} | {row.rerouted:.2%} | {row.same:.0f} | {row.whole} |"
    )


def conditions(names: list[str], run: Run, text: Tensor) -> str:
    """What the table rests on."""
    sizes = [build(name).num_parameters() / 1e6 for name in names]
    facts = "; ".join(f"{name} {routing_facts(name, run, text)}" for name in names)
    return (
        f"{run.steps} steps of {BATCH * CONTEXT:,} bytes, seed {run.seed}; {min(sizes):.2f} to "
        f"{max(sizes):.2f} M parameters, d 96, 4 layers of 8 experts of width 96. Loss of the last "
        f"50 steps in bits a byte, weight of a token's first expert, share of the least used "
        f"expert: {facts}. {text.numel():,} bytes of held-out text (CPython "
        f"{platform.python_version()}) in passages of {CONTEXT}; {PROMPTS} prompts of {PROMPT} "
        f"bytes, continued by {CONTEXT - PROMPT}; reference runtime."
    )


def routing_facts(name: str, run: Run, text: Tensor) -> str:
    """A model's loss, the mean weight of the first expert, the least share of one in any layer."""
    model, loss = trained(name, run)
    routing: Routing = []
    heard(model, routing)
    with torch.no_grad():
        model(input_ids=text, use_cache=False)
    first = np.mean([weights.amax(-1).mean().item() for weights, _ in routing])
    experts = model.config.num_experts
    least = min(shares(*layer, experts)[:experts].min().item() for layer in routing)
    return f"{loss:.3f}, {first:.2f}, {least:.1%}"


def write(table: str) -> None:
    """The table between its markers in docs/compression.md."""
    PagePart("compression.md", "top-k").write(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--models", nargs="*", default=list(MODELS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names, run = arguments.models, Run(arguments.work, arguments.steps, arguments.seed)
    run.work.mkdir(parents=True, exist_ok=True)
    for name in names:
        trained(name, run)
    if arguments.train_only:
        return
    text = torch.tensor(passages(read_corpus(Settings.held_out_percent).held_out))
    lines = [HEAD, "|---|---|" + "---:|" * (HEAD.count("|") - 3)]
    for name in names:
        for row in measure(name, run, text):
            lines.append(line(row))
            say(lines[-1])
    lines += ["", conditions(names, run, text)]
    print("\n".join(lines))
    if arguments.write:
        write("\n".join(lines))


if __name__ == "__main__":
    main()
