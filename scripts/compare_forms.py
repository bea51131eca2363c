"""What another form of a part would be worth to Core ML's cost decision: print the table of
docs/placement.md, or put it there.

    python scripts/compare_forms.py [--write] [MODEL ...]

Each model's functions for one token (an encoder's for 128) are made with their real sizes, without
weights, in our forms and in others, and priced by Core ML's own estimates
(ane_moe/placement/estimates.toml): the cheapest way through the function, and how many runs on the
engine it has. Nothing is measured.
"""

import logging
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ane_moe.conversion.plan import ConvertOptions  # noqa: E402
from ane_moe.emit.coreml import tracing  # noqa: E402
from ane_moe.families import describe_config  # noqa: E402
from ane_moe.forecast.layer_kinds import KindsPlan, plan_kinds  # noqa: E402
from ane_moe.formats.recipe import FP16  # noqa: E402
from ane_moe.mlprogram.reader import read_program  # noqa: E402
from ane_moe.model.moe import MoeConfig  # noqa: E402
from ane_moe.model.spec import MlpSpec  # noqa: E402
from ane_moe.model.template_key import TemplateKey  # noqa: E402
from ane_moe.parts import attention, cca, router  # noqa: E402
from ane_moe.parts.experts import tree_sum  # noqa: E402
from ane_moe.parts.mlp import GatedMlp  # noqa: E402
from ane_moe.parts.moe import Moe  # noqa: E402
from ane_moe.parts.norm import RmsNorm  # noqa: E402
from ane_moe.parts.projection import Projection  # noqa: E402
from ane_moe.placement.dispatch import Choice, dispatch  # noqa: E402
from ane_moe.placement.estimates import estimate_book  # noqa: E402
from ane_moe.placement.facts import FunctionFacts, function_facts  # noqa: E402
from ane_moe.placement.rules import rule_book  # noqa: E402
from ane_moe.placement.targets import find_target  # noqa: E402
from scripts.doc_page import PagePart  # noqa: E402
from scripts.make_checkpoint import PRESETS  # noqa: E402
from tests.placement.real_sizes import write_graph  # noqa: E402

logging.getLogger("coremltools").setLevel(logging.ERROR)
TABLE = PagePart("placement.md", "forms")
CHIPS, SYSTEM = ("m1", "m4", "m5", "m6"), 27
SLOTS = 2048  # of the caches
LENGTH = 128  # tokens of a call of an encoder
MOST_SUMMED = 16_384  # channels that a product sums over
FAR = 2e4
DECODERS = (
    "granite-3.1-1b-a400m",
    "qwen3-30b-a3b",
    "qwen1.5-moe-a2.7b",
    "mixtral-8x7b",
    "olmoe-1b-7b",
    "lfm2-8b-a1b",
    "zaya1-8b",
)
ENCODERS = ("privacy-filter",)
MODELS = DECODERS + ENCODERS
PRODUCTS = ("conv", "matmul")
OUR_NORM, OUR_MOE = RmsNorm.__init__, Moe.__init__


@dataclass(frozen=True)
class Form:
    """`put`: what stands in the place of ours, as (owner, name, other). `kept` says whether the
    results stay what they are for every input, or what becomes of them. `of`: the models that it is
    for."""

    part: str
    label: str
    kept: str
    put: tuple[tuple[Any, str, Any], ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    of: tuple[str, ...] = MODELS


def squares(self: RmsNorm, x: Tensor) -> Tensor:
    power = (x * x).mean(self.axis, keepdim=True) + self.root_eps**2
    return x * torch.rsqrt(power) * self.weight


def mirrored(self: RmsNorm, x: Tensor) -> Tensor:
    """A layer norm of x and -x, whose mean is 0."""
    y = torch.cat([x, -x], dim=self.axis).transpose(self.axis, 3)
    y = torch.nn.functional.layer_norm(y, y.shape[3:], eps=self.root_eps**2)
    channels = y.shape[3] // 2
    return y[:, :, :, :channels].transpose(self.axis, 3) * self.weight


def counted(self: RmsNorm, channels: int, eps: float, axis: int = 1) -> None:
    OUR_NORM(self, channels, eps, axis)
    self.channels = channels


def lengths(self: RmsNorm, x: Tensor) -> Tensor:
    """By the operation for a vector's length, after the largest is out."""
    largest = x.abs().amax(self.axis, keepdim=True).clamp(min=self.root_eps)
    y = x / largest
    length = torch.linalg.vector_norm(y, dim=self.axis, keepdim=True)
    root = torch.full((1, 1, 1, 1), self.root_eps, dtype=x.dtype) / largest
    power = length * length * (1 / self.channels) + root * root
    return y * torch.rsqrt(power) * self.weight


def sorted_mask(logits: Tensor, k: int, experts: int) -> Tensor:
    """By `topk`: all that reach the k-th value."""
    least = torch.topk(logits, k, dim=1).values[:, k - 1 : k]
    return ((logits - least) * FAR + 1).clamp(0, 1)


def rounds_mask(logits: Tensor, k: int, experts: int) -> Tensor:
    """k rounds of maximum and mask; equal ones together."""
    rest, mask = logits, torch.zeros((), dtype=logits.dtype)
    for _ in range(k):
        best = ((rest - rest.amax(1, keepdim=True)) * FAR + 1).clamp(0, 1)
        mask, rest = mask + best, rest - best * FAR
    return mask.clamp(0, 1)


def keys_first(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, *_: None
) -> Tensor:
    """Caches turned, queries as they come: for one token."""
    heads, head_dim, kv_heads = q.shape[1], q.shape[2], keys.shape[1]
    q = (q * scale).reshape(1, kv_heads, -1, head_dim).transpose(2, 3)  # (1, K, D, G)
    scores = keys.transpose(2, 3) @ q + mask.transpose(2, 3)  # (1, K, S, G)
    mixed = values @ torch.softmax(scores, dim=2)  # (1, K, D, G)
    return mixed.transpose(2, 3).reshape(1, heads * head_dim, 1, -1)


def fused(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, *_: None) -> Tensor:
    """Core ML's own attention: for one token."""
    heads, head_dim, kv_heads = q.shape[1], q.shape[2], keys.shape[1]
    q = q.reshape(1, kv_heads, -1, head_dim)
    turned = (x.transpose(2, 3) for x in (keys, values))
    y = torch.nn.functional.scaled_dot_product_attention(q, *turned, mask, scale=scale)
    return y.reshape(1, heads * head_dim, 1, -1)


def caches(attend: Callable[..., Tensor]) -> tuple[tuple[Any, str, Any], ...]:
    """Of one token, which the converter has to be told: our graphs hold for any count."""
    as_it_is = (tracing, "with_token_count", lambda program, tokens: program)
    return (attention, "attend", attend), (cca, "attend", attend), (tracing, "MARKER", 1), as_it_is


class WideExperts(nn.Module):
    """Experts side by side, `(1, d, 1, T)` each: the last product sums over all of them, and
    another adds their biases by the gates."""

    def __init__(self, d_model: int, spec: MlpSpec, count: int):
        super().__init__()
        self.count, width = count, count * spec.width
        self.mlp = GatedMlp(d_model, replace(spec, width=width))
        self.mlp.down = Projection(width, d_model)
        self.biases = Projection(count, d_model) if spec.bias else None

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        hidden = self.mlp._hidden(x)
        apart = hidden.reshape(1, self.count, hidden.shape[1] // self.count, -1)
        y = self.mlp.down((apart * gates).reshape(1, hidden.shape[1], 1, -1))
        return y if self.biases is None else y + self.biases(gates)


def widened(self: Moe, config: MoeConfig) -> None:
    """As few products as may sum over their channels."""
    OUR_MOE(self, config)
    expert, most = config.moe.expert, MOST_SUMMED // config.moe.expert.width
    firsts = range(0, config.experts, most)
    sizes = [min(most, config.experts - first) for first in firsts]
    self.experts = nn.ModuleList(WideExperts(config.d_model, expert, size) for size in sizes)


def side_by_side(self: Moe, **inputs: Tensor) -> dict[str, Tensor]:
    """Of a layer without shared experts, its norm before."""
    x = inputs["x"]
    h = self.norm(x)
    gates, _ = self.router.gates(h, inputs)
    mine = self.select(gates) if self.config.split else gates
    each = mine.split([expert.count for expert in self.experts], dim=1)
    added = tree_sum([expert(h, own) for expert, own in zip(self.experts, each, strict=True)])
    y = self.residual(x, added) if self.config.first else self.residual.alone(added)
    return {"y": y, "gates": gates}


FORMS = (
    Form("", "ours", ""),
    Form("norm", "squares of x itself", "no: Inf beyond 255", ((RmsNorm, "forward", squares),)),
    Form("norm", "layer_norm of x and -x", "no: Inf beyond 255", ((RmsNorm, "forward", mirrored),)),
    Form(
        "norm",
        "reduce_l2_norm",
        "rounded otherwise",
        ((RmsNorm, "forward", lengths), (RmsNorm, "__init__", counted)),
    ),
    Form("attention", "caches turned", "yes, but one token only", caches(keys_first), of=DECODERS),
    Form("attention", "fused operation", "no: NaN since OS 26", caches(fused), of=DECODERS),
    Form("attention", "--state explicit", "yes", options={"state": "explicit"}, of=DECODERS),
    Form("router", "topk", "no: all of equal ones", ((router, "top_k_mask", sorted_mask),)),
    Form("router", "k rounds of maximum", "no: as topk", ((router, "top_k_mask", rounds_mask),)),
    Form(
        "experts",
        "side by side in 6 products",
        "yes",
        ((Moe, "__init__", widened), (Moe, "forward", side_by_side)),
        of=ENCODERS,
    ),
)


@dataclass(frozen=True)
class Total:
    """Of the calls of one token, by estimates: the cheapest way, its runs on the engine, the
    operations that stay on the CPU, and what the engine saves in those after the last product of a
    function."""

    ms: float = 0.0
    runs: int = 0
    on_cpu: int = 0
    tail_ms: float = 0.0

    def __add__(self, other: "Total") -> "Total":
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Total(*(one + two for one, two in pairs))

    def times(self, count: int) -> "Total":
        return Total(*(count * value for value in vars(self).values()))


def priced(function: FunctionFacts, chip: str) -> Total:
    """Of estimates that are not known, the first is taken."""
    target = find_target(chip, SYSTEM)
    rules, prices = rule_book(target), estimate_book(target)
    choices = []
    for op in function.ops:
        off = any(rule.verdict == "cpu" for rule in rules.matching("op", op.facts))
        choices.append(Choice(not off, prices.candidates(op.facts)[:1]))
    placed = dispatch(choices, prices.run).surely
    saved = [choice.estimates[0].saved_ms for choice in choices]
    cost = sum(
        choice.estimates[0].ane_ms if engine else choice.estimates[0].cpu_ms
        for choice, engine in zip(choices, placed, strict=True)
    )
    runs = sum(engine for engine, _ in groupby(placed))
    products = [at for at, op in enumerate(function.ops) if op.operation.type in PRODUCTS]
    tail = sum(saved[1 + max(products, default=-1) :])
    return Total(cost + runs * prices.run.most_ms, runs, placed.count(False), tail)


def total(config: dict[str, Any], form: Form, chips: tuple[str, ...]) -> dict[str, Total]:
    """By chip: masked layers and head, and of sparse routing its mixers with routers."""
    spec = describe_config(config, "config.json")
    found = dict.fromkeys(chips, Total())
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for owner, name, other in form.put:
            stack.enter_context(mock.patch.object(owner, name, other))
        for routing in ("masked", "sparse"):
            calls = {"lengths": (LENGTH,)} if spec.is_encoder else {"prefill": 0, "context": SLOTS}
            asked = {"routing": routing, "recipe": FP16, **calls}
            options = ConvertOptions(**(asked | form.options))
            for number, (key, count) in enumerate(graphs(plan_kinds(spec, options))):
                package = write_graph(key, Path(folder) / f"{routing}_{number}")
                program = read_program(package)
                facts = function_facts(program, program.default_function)
                for chip in chips:
                    found[chip] += priced(facts, chip).times(count)
    return found


def graphs(kinds: KindsPlan) -> Iterator[tuple[TemplateKey, int]]:
    """Each graph with the number of its calls for a token."""
    counts = Counter[TemplateKey]()
    for shard in kinds.plan.shards:
        if kinds.plan.options.routing == "masked" or shard.kind == "attn":
            for key in shard.graphs.values():
                counts[key] += 1 if shard.layer is None else kinds.repeats[shard.layer]
    return iter(counts.items())


def row(model: str, form: Form, found: dict[str, Total], ours: dict[str, Total]) -> str:
    cells = []
    for chip, mine in found.items():
        less = "" if form.part == "" else f" ({mine.ms - ours[chip].ms:+.2f})"
        cells.append(f"{mine.ms:.2f}{less}, {mine.runs}")
    what = f"{form.part}: {form.label}" if form.part else form.label
    tail = f"{1e3 * next(iter(found.values())).tail_ms:.0f}"
    return f"| {model} | {what} | {form.kept} | {' | '.join(cells)} | {tail} |"


def rows(model: str, chips: tuple[str, ...] = CHIPS) -> Iterator[str]:
    ours = total(PRESETS[model], FORMS[0], chips)
    for form in (form for form in FORMS if model in form.of):
        found = total(PRESETS[model], form, chips) if form.part else ours
        if form is FORMS[0] or found != ours:
            yield row(model, form, found, ours)


def main(arguments: list[str]) -> int:
    models = [name for name in arguments if name != "--write"] or MODELS
    lines = [
        f"| model | form | the same results | {', ms and runs | '.join(CHIPS)}, ms and runs | "
        f"tails on {CHIPS[0]}, us |",
        f"|---|---|---|{'---|' * len(CHIPS)}---|",
    ]
    for model in models:
        for line in rows(model):
            print(line, file=sys.stderr)
            lines.append(line)
    text = "\n".join(lines)
    if "--write" in arguments:
        TABLE.write(text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
