"""What a conversion will take, by what others took (`conversion_cost.toml`): an estimate."""

import functools
import math
import re
import tomllib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ane_moe.checkpoints.checkpoint import TensorSource
from ane_moe.conversion.plan import MB, ConversionPlan, ShardPlan
from ane_moe.forecast.chips import Range
from ane_moe.forecast.layer_kinds import KindsPlan

CONVERSION_COST = Path(__file__).with_name("conversion_cost.toml")


def conversion_seconds(kinds: KindsPlan) -> Range | None:
    """Tracing each graph, writing all weights, and encoding those of each format, which two workers
    share. None where a format was never timed."""
    times, sizes = _tables(), _sizes_by_format(kinds)
    whole = sum(sizes.values())
    sizes.pop("fp16", None)
    if any(_base(name) not in times["encode"] for name in sizes):
        return None
    graphs = len({graph for shard in kinds.plan.shards for graph in shard.graphs.values()})
    workers = times["memory"]["workers"]

    def seconds(cost: str, rate: str) -> float:
        """Of one end: costs go with it, and rates against it."""
        encoding = sum(
            size / times["encode"][_base(name)][rate] / workers for name, size in sizes.items()
        )
        return float(graphs * times["trace"][cost] + whole / times["write"][rate] + encoding)

    return Range(seconds("low", "high"), seconds("expected", "expected"), seconds("high", "low"))


def conversion_memory_bytes(plan: ConversionPlan) -> int:
    """The most that all processes of a conversion hold together: what its dearest format took, and
    what the largest weight of each worker has beyond those measured."""
    facts, formats = _tables()["memory"], {_base(name) for name in _formats(plan.shards)}
    most = max(facts.get(name, facts["other"]) for name in {"fp16", *formats})
    beyond = max(0, plan.largest_weight_bytes - facts["largest_weight_mb"] * MB)
    return int(most * MB + facts["workers"] * beyond)


def _sizes_by_format(kinds: KindsPlan) -> dict[str, float]:
    """MB, in fp16, of the weights that each format stores."""
    plan, sizes = kinds.plan, Counter[str]()
    sizes[plan.embed_format] += plan.spec.vocab * plan.spec.d_model
    for shard in plan.shards:
        times = 1 if shard.layer is None else kinds.repeats[shard.layer]
        for name, source in shard.sources.items():
            if isinstance(source, TensorSource):
                form = shard.choices[name].format if name in shard.choices else "fp16"
                sizes[form] += times * math.prod(source.shape)
    return {name: 2e-6 * count for name, count in sizes.items()}


def _formats(shards: Iterable[ShardPlan]) -> set[str]:
    return {choice.format for shard in shards for choice in shard.choices.values()}


def _base(name: str) -> str:
    """A palette's name without its group, which hardly changes the time."""
    return re.sub(r"-g\d+$", "", name)


@functools.cache
def _tables() -> dict[str, Any]:
    return tomllib.loads(CONVERSION_COST.read_text())
