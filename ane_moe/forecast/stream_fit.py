"""What of a model stays in memory with its experts in a store, and how many of them do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ane_moe.conversion.plan import ConversionPlan, ConvertOptions
from ane_moe.errors import UserError
from ane_moe.forecast.layer_kinds import plan_kinds
from ane_moe.formats.recipe import Recipe
from ane_moe.loop.memory_budget import MB, Budget, budget_of
from ane_moe.model.spec import ModelSpec, MoeSpec


@dataclass(frozen=True)
class StreamFit:
    """A stream conversion under a limit of memory: what is `resident` beside experts, `stored`
    bytes of an expert (the largest), the most `read` for a token, and the `budget`, or why there is
    none."""

    recipe: str
    resident_bytes: int
    stored_expert_bytes: int
    most_read_bytes_per_token: int
    budget: Budget | None
    refusal: str = ""

    def as_json(self) -> dict[str, Any]:
        facts = {name: value for name, value in vars(self).items() if name != "budget"}
        return facts | {"budget": self.budget.as_json() if self.budget else None}


def stream_fits(
    spec: ModelSpec,
    recipes: Sequence[Recipe],
    memory_mb: float,
    context: int | None = None,
    prefill: int = 64,
) -> tuple[StreamFit, ...]:
    """How a model's experts fit into `memory_mb` (10^6 bytes) with each of `recipes`; nothing for
    models that have none to stream. Recipes that a store does not hold are refused in their row."""
    routed = any(isinstance(layer.ffn, MoeSpec) for layer in spec.layers)
    if spec.tracks or not routed:
        return ()
    return tuple(_fit(spec, recipe, memory_mb, context, prefill) for recipe in recipes)


def _fit(
    spec: ModelSpec, recipe: Recipe, memory_mb: float, context: int | None, prefill: int
) -> StreamFit:
    options = ConvertOptions(routing="stream", context=context, prefill=prefill, recipe=recipe)
    try:
        kinds = plan_kinds(spec, options)
    except UserError as error:
        return StreamFit(recipe.name, 0, 0, 0, None, str(error))
    plan = kinds.plan
    shards = [
        shard
        for shard in plan.shards
        for _ in range(1 if shard.layer is None else kinds.repeats.get(shard.layer, 1))
    ]
    stores = [(shard.layer, shard.store.record.size) for shard in shards if shard.store]
    read = sum(_chosen(plan, layer) * size for layer, size in stores if layer is not None)
    largest = max(size for _, size in stores)
    resident = sum(shard.weight_bytes for shard in shards if shard.store is None) + plan.embed_bytes
    facts = (recipe.name, resident, largest, read)
    try:
        return StreamFit(*facts, budget_of(shards, plan.embed_bytes, int(memory_mb * MB)))
    except UserError as error:
        return StreamFit(*facts, None, str(error))


def _chosen(plan: ConversionPlan, layer: int) -> int:
    ffn = plan.spec.layers[layer].ffn
    assert isinstance(ffn, MoeSpec)
    return ffn.router.k
