"""What of a model stays in memory with its experts in a store, how many of them do, and how fast it
would then be."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ane_moe.conversion.plan import ConversionPlan, ConvertOptions
from ane_moe.errors import UserError
from ane_moe.forecast.chips import Chip
from ane_moe.forecast.early_cost import EarlyCost
from ane_moe.forecast.layer_kinds import plan_kinds
from ane_moe.forecast.stream_speed import Reading, StreamSpeed, stream_speed
from ane_moe.forecast.verdict import short
from ane_moe.forecast.workload import computing_of, workload_of_plan
from ane_moe.formats.recipe import Recipe
from ane_moe.loop.memory_budget import MB, Budget, budget_of
from ane_moe.model.spec import ModelSpec, MoeSpec


@dataclass(frozen=True)
class StreamFit:
    """A stream conversion under a limit of memory: what is `resident` beside experts, `stored`
    bytes of an expert (the largest), the most `read` for a token, the `budget`, or why there is
    none, and the speed that is predicted of it."""

    recipe: str
    memory_mb: float
    resident_bytes: int
    stored_expert_bytes: int
    most_read_bytes_per_token: int
    budget: Budget | None
    refusal: str = ""
    speed: StreamSpeed | None = None

    @property
    def sentence(self) -> str:
        """What to take of streams, where this is the fastest of those that fit."""
        assert self.budget and self.speed
        speed, rate = self.speed, self.speed.tok_s
        return (
            f"In {self.memory_mb:,.0f} MB {self.budget.fitting:,} of {self.budget.total:,} experts "
            f"stay; about {short(rate.expected)} tok/s ({short(rate.low)} to {short(rate.high)}, "
            f"predicted, if the disk reads {speed.read_gb_s:g} GB/s and {speed.hit_rate:.0%} of "
            f"the experts called are there); "
            f"take --routing stream --compress {self.recipe}."
        )

    def as_json(self) -> dict[str, Any]:
        own = {"budget": self.budget, "speed": self.speed}
        facts = {name: value for name, value in vars(self).items() if name not in own}
        return facts | {name: one.as_json() if one else None for name, one in own.items()}


def stream_fits(
    spec: ModelSpec,
    recipes: Sequence[Recipe],
    memory_mb: float,
    chip: Chip,
    reading: Reading,
    context: int | None = None,
    prefill: int = 64,
    early: EarlyCost | None = None,
) -> tuple[StreamFit, ...]:
    """How a model's experts fit into `memory_mb` (10^6 bytes) with each of `recipes`, and how fast
    `chip` would be with them, also with what shards guess `early`; nothing for models that have
    none to stream. Recipes that a store does not hold are refused in their row."""
    routed = any(isinstance(layer.ffn, MoeSpec) for layer in spec.layers)
    if spec.tracks or not routed:
        return ()
    options = ConvertOptions(routing="stream", context=context, prefill=prefill)
    each = (replace(options, recipe=recipe) for recipe in recipes)
    return tuple(_fit(spec, own, memory_mb, chip, reading, early) for own in each)


def best_stream(streams: Sequence[StreamFit]) -> StreamFit | None:
    """The fastest that is expected, if any fits."""
    fitting = {fit.speed.tok_s.expected: fit for fit in reversed(streams) if fit.speed}
    return fitting[max(fitting)] if fitting else None


def _fit(
    spec: ModelSpec,
    options: ConvertOptions,
    memory_mb: float,
    chip: Chip,
    reading: Reading,
    early: EarlyCost | None,
) -> StreamFit:
    name = options.recipe.name
    try:
        kinds = plan_kinds(spec, options)
    except UserError as error:
        return StreamFit(name, memory_mb, 0, 0, 0, None, str(error))
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
    facts = (name, memory_mb, resident, largest, read)
    try:
        budget = budget_of(shards, plan.embed_bytes, int(memory_mb * MB))
    except UserError as error:
        return StreamFit(*facts, None, str(error))
    hits = budget.fitting / budget.total if reading.hit_rate is None else reading.hit_rate
    workload = workload_of_plan(plan, kinds.repeats)
    k = sum(_chosen(plan, layer) for layer, _ in stores if layer is not None) / len(stores)
    assumed = replace(reading, hit_rate=hits)
    speed = stream_speed(workload, chip, read, len(stores), k, assumed, early)
    return StreamFit(*facts, budget, speed=speed)


def _chosen(plan: ConversionPlan, layer: int) -> int:
    ffn = plan.spec.layers[layer].ffn
    assert isinstance(ffn, MoeSpec)
    return computing_of(ffn)
