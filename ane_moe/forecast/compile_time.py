"""How long the engine's compiler takes for long chains of arithmetic, and how many layers a shard
may have for it. A prediction: a range with a source (`engine_speed.toml`)."""

import math
from collections.abc import Iterable
from itertools import pairwise

from ane_moe.conversion.plan import ConversionPlan
from ane_moe.forecast.chips import Range
from ane_moe.forecast.engine_speed import table
from ane_moe.forecast.planned_facts import elementwise_in_a_row
from ane_moe.forecast.workload import Chain, add, times

NONE = Range(0, 0, 0)


def chain_seconds(steps: float, chip: str) -> Range:
    """Compiling one function with `steps` elementwise operations in a row, on Core ML's cores; 0 on
    chips whose compiler showed no such growth."""
    facts = table("compile")
    if chip != facts["chip"]:
        return NONE
    compiled, slower = facts["steps_of_an_operation"], facts["efficiency_cores"]
    ends = (slower * _seconds(steps * compiled[end]) for end in ("low", "expected", "high"))
    return Range(*ends)


def compile_seconds(chains: Iterable[Chain], chip: str) -> Range:
    """Compiling the chains of every function of a model, one after the other."""
    return add(times(chain_seconds(chain.steps, chip), chain.functions) for chain in chains)


def most_layers(plan: ConversionPlan, chip: str, most: int) -> int:
    """Layers that a shard may have, up to `most`, for none of its functions to take longer to
    compile than is bearable; at least 1. `plan` has one layer in a shard."""
    graphs: dict[int, set] = {}
    for shard in plan.shards:
        if shard.layer is not None:
            graphs.setdefault(shard.layer, set()).update(shard.graphs.values())
    longest = max((sum(map(elementwise_in_a_row, keys)) for keys in graphs.values()), default=0)
    limit = table("compile")["most_seconds"]
    fitting = (n for n in range(most, 1, -1) if chain_seconds(n * longest, chip).expected <= limit)
    return next(fitting, 1)


def _seconds(steps: float) -> float:
    """In a process of its own: a power of the steps between two points, and beyond the ends."""
    facts = table("compile")
    points = [(row["steps"], row["seconds"]) for row in facts["chain"]]
    for (start, low), (end, high) in pairwise(points):
        if start <= steps <= end:
            return low * (high / low) ** (math.log(steps / start) / math.log(end / start))
    base, seconds = points[0] if steps < points[0][0] else points[-1]
    return float(seconds * (steps / base) ** facts["exponent"])
