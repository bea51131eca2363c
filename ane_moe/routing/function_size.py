"""How many experts to put into a function: few calls cost few call overheads, large functions
stream weights in vain.

For each size the experts are grouped anew, and the cost model gives the time of a token's expert
calls.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ane_moe.errors import UserError
from ane_moe.forecast.chips import Chip, Range
from ane_moe.forecast.cost_model import NOTE, breakdown
from ane_moe.forecast.workload import Calls
from ane_moe.formats.recipe import find_format
from ane_moe.routing.grouping import GroupingReport, group_experts
from ane_moe.routing.routing_trace import RoutingTrace

SIZES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class SizeCost:
    """Expert calls of one decoded token, over all layers, on the tokens left out of the fit, and
    the time predicted for them and the host: grouped, and by index."""

    experts_per_function: int
    functions_per_token: float
    functions_per_token_by_index: float
    ms_per_token: Range
    ms_per_token_by_index: Range


@dataclass(frozen=True)
class SizeChoice:
    """The size with the least expected time, its grouping, and the costs of all sizes that were
    tried."""

    chip: str
    format: str
    report: GroupingReport
    costs: tuple[SizeCost, ...]
    note: str = NOTE

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints, beside the grouping's own report."""
        return {
            "kind": "predicted",
            "chip": self.chip,
            "format": self.format,
            "note": self.note,
            "sizes": [asdict(cost) for cost in self.costs],
        }


def choose_size(
    trace: RoutingTrace, chip: Chip, form: str, sizes: Sequence[int] = SIZES
) -> SizeChoice:
    """Group the experts by each of `sizes` (as far as there are so many) and keep the size that
    `chip` is expected to run fastest with weights in the format `form`.

    Raises UserError when the trace does not say how many weights an expert has, and for an unknown
    format.
    """
    if any(not layer.expert_weights for layer in trace.layers.values()):
        raise UserError(
            "the trace does not say how many weights an expert has",
            "0",
            "trace the checkpoint, or shards of masked or sparse routing",
        )
    least = min(layer.experts for layer in trace.layers.values())
    reports = {size: group_experts(trace, size) for size in sizes if size <= least}
    costs = tuple(_cost(trace, report, chip, form) for report in reports.values())
    best = min(costs, key=lambda cost: cost.ms_per_token.expected)
    return SizeChoice(chip.name, form, reports[best.experts_per_function], costs)


def _cost(trace: RoutingTrace, report: GroupingReport, chip: Chip, form: str) -> SizeCost:
    size, gains = report.grouping.experts_per_function, report.gains
    grouped = {layer: gain.grouped for layer, gain in gains.items()}
    by_index = {layer: gain.index_order for layer, gain in gains.items()}
    return SizeCost(
        size,
        sum(grouped.values()),
        sum(by_index.values()),
        _time(trace, grouped, size, chip, form),
        _time(trace, by_index, size, chip, form),
    )


def _time(
    trace: RoutingTrace, functions: dict[int, float], size: int, chip: Chip, form: str
) -> Range:
    """Milliseconds of a token's expert calls and of the host; the other shards are the same for
    every size."""
    calls, stored = [], find_format(form)
    for layer, count in functions.items():
        weights = size * trace.layers[layer].expert_weights
        stored_bytes = round(weights * stored.bits_per_weight / 8)
        once = Range(count, count, count)
        calls.append(Calls("experts", once, stored_bytes, weights, stored.rate))
    return breakdown(tuple(calls), chip).per_token_ms
