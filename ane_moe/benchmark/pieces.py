"""What a model's packages hold, as far as time and memory depend on it: the same facts from a finished conversion, from
a plan, or from a config.json alone."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from ane_moe.benchmark.formats import bits_of, rate_of
from ane_moe.compress.recipe import Recipe, find_recipe, recipe_of
from ane_moe.manifest import Manifest, Shard
from ane_moe.plan import ConversionPlan, ShardPlan
from ane_moe.spec import MoeSpec

# The tensors that hold most of the weights of a kind of shard.
LARGEST = {
    "attn": "layers.{layer}.attn.q.weight",
    "moe": "layers.{layer}.ffn.experts.{expert}.gate.weight",
    "experts": "layers.{layer}.ffn.experts.{expert}.gate.weight",
    "stack": "layers.{layer}.ffn.experts.0.gate.weight",
    "dense": "layers.{layer}.ffn.gate.weight",
    "lm_head": "head.weight",
}
AnyShard = TypeVar("AnyShard", Shard, ShardPlan)
EXPERT_FUNCTION = re.compile(r"expert_(\d+)_t(\d+)")


@dataclass(frozen=True)
class ExpertSet:
    """A layer's experts as functions that the host calls: `k` of `experts`, `group` of them in a function, which exists
    for each token count in `tokens`. `shared_share` of the bytes is an expert that is always called."""

    experts: int
    k: int
    group: int
    tokens: tuple[int, ...]
    shared_share: float = 0.0

    @property
    def functions(self) -> int:
        """Functions for one token count."""
        return math.ceil(self.experts / self.group) + (1 if self.shared_share else 0)


@dataclass(frozen=True)
class Piece:
    """One package, or the `packages` of one layer's expert functions: `stored_bytes` of `weights` elements, worked
    off at the chip's `rate` for them. The KV states take `cache_bytes`, the whole width."""

    kind: str
    stored_bytes: int
    weights: int
    rate: str
    cache_bytes: int = 0
    packages: int = 1
    experts: ExpertSet | None = None


def pieces_of_manifest(manifest: Manifest) -> list[Piece]:
    """The packages of a finished conversion; weights are counted from bytes and the format of the kind's role.

    Raises UserError when the recipe in the manifest cannot be read.
    """
    recipe = recipe_of(manifest.weights, manifest.recipe) if manifest.recipe else find_recipe(manifest.weights)
    whole = [
        Piece(shard.kind, shard.weight_bytes, *_counted(shard, recipe), _cache_bytes(shard.states))
        for shard in manifest.shards
        if shard.kind != "experts"
    ]
    layers = _by_layer(shard for shard in manifest.shards if shard.kind == "experts")
    return whole + [_expert_piece(shards, manifest.moe[str(layer)], recipe) for layer, shards in layers.items()]


def pieces_of_plan(plan: ConversionPlan) -> list[Piece]:
    """The packages that a conversion will write."""
    whole = [
        Piece(shard.kind, shard.weight_bytes, _elements(shard), _rate(shard), _cache_bytes(shard.states))
        for shard in plan.shards
        if shard.kind != "experts"
    ]
    layers = _by_layer(shard for shard in plan.shards if shard.kind == "experts")
    return whole + [_planned_experts(plan, layer, shards) for layer, shards in layers.items()]


def merge(pieces: Iterable[Piece]) -> list[tuple[Piece, int]]:
    """Equal pieces once each, with their number."""
    return list(Counter(pieces).items())


def _by_layer(shards: Iterable[AnyShard]) -> dict[int, list[AnyShard]]:
    layers: dict[int, list[AnyShard]] = defaultdict(list)
    for shard in shards:
        assert shard.layer is not None
        layers[shard.layer].append(shard)
    return layers


def _expert_piece(shards: list[Shard], facts: dict[str, Any], recipe: Recipe) -> Piece:
    """From the names of the functions and the layer's facts in the manifest."""
    found = [EXPERT_FUNCTION.fullmatch(function.name) for shard in shards for function in shard.functions]
    tokens = tuple(sorted({int(match[2]) for match in found if match}))
    functions = len({match[1] for match in found if match})
    group = math.ceil(facts["experts"] / functions)
    stored = sum(shard.weight_bytes for shard in shards)
    share = _shared_share(facts["experts"], facts.get("expert_width", 1), facts.get("shared_width", 0))
    experts = ExpertSet(facts["experts"], facts["k"], group, tokens, share)
    counted = [_counted(shard, recipe) for shard in shards]
    return Piece(
        "experts", stored, sum(weights for weights, _ in counted), counted[0][1], packages=len(shards), experts=experts
    )


def _planned_experts(plan: ConversionPlan, layer: int, shards: list[ShardPlan]) -> Piece:
    moe = plan.spec.layers[layer].ffn
    assert isinstance(moe, MoeSpec)
    share = _shared_share(moe.router.experts, moe.expert.width, moe.shared.mlp.width if moe.shared else 0)
    functions = sum(prefix.startswith("expert_") for shard in shards for prefix in shard.graphs)
    group = math.ceil(moe.router.experts / functions)
    experts = ExpertSet(moe.router.experts, moe.router.k, group, plan.options.expert_tokens, share)
    stored, weights = sum(shard.weight_bytes for shard in shards), sum(map(_elements, shards))
    return Piece("experts", stored, weights, _rate(shards[0]), packages=len(shards), experts=experts)


def _counted(shard: Shard, recipe: Recipe) -> tuple[int, str]:
    """Elements of a finished shard, and their rate."""
    layer = 0 if shard.layer is None else shard.layer
    name = recipe.choice(LARGEST[shard.kind].format(layer=layer, expert=next(iter(shard.experts), 0))).format
    return round(shard.weight_bytes * 8 / bits_of(name)), rate_of(name)


def _rate(shard: ShardPlan) -> str:
    """The rate of the format that most of a shard's weights have."""
    sizes: Counter[str] = Counter()
    for name, source in shard.weights.items():
        sizes[shard.choices[name].format if name in shard.choices else "fp16"] += math.prod(source.shape)
    return rate_of(sizes.most_common(1)[0][0])


def _shared_share(experts: int, width: int, shared_width: int) -> float:
    return shared_width / (experts * width + shared_width)


def _elements(shard: ShardPlan) -> int:
    return sum(math.prod(source.shape) for source in shard.weights.values())


def _cache_bytes(states: object) -> int:
    """fp16 bytes of a shard's states, given as name -> shape."""
    assert isinstance(states, dict)
    return sum(2 * math.prod(shape) for shape in states.values())
