"""What a routing trace says at a glance, layer by layer."""

import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ane_moe.routing.routing_trace import RoutingTrace
from ane_moe.routing.traffic import ExpertTraffic, expert_traffic

CACHE_SHARES = (0.25, 0.5, 0.75, 1.0)  # of all experts' bytes


@dataclass(frozen=True)
class LayerStatistics:
    """`usage` is each expert's share of the choices, summing to 1; `entropy` its entropy over that
    of even use, 0 to 1. `repeated` is the share of a token's experts that the token before it in
    the passage chose too; None without one. `top_weight` is the mean share of the largest
    weight."""

    layer: int
    experts: int
    k: int
    usage: tuple[float, ...]
    entropy: float
    repeated: float | None
    top_weight: float


@dataclass(frozen=True)
class Overlap:
    """`share` of the experts that tokens choose in `layer`: those that the next layer with experts,
    `following`, chooses for the same token too. `by_chance` is what it would be if both used each
    expert as often as they do, but chose without regard to each other."""

    layer: int
    following: int
    share: float
    by_chance: float


@dataclass(frozen=True)
class TraceSummary:
    """`traffic` is empty where the trace does not say what experts take; `overlaps` has no pairs of
    layers with different numbers of experts."""

    family: str
    source: str
    tokens: int
    passages: int
    expert_bytes: int
    layers: tuple[LayerStatistics, ...]
    traffic: tuple[ExpertTraffic, ...]
    overlaps: tuple[Overlap, ...]

    @property
    def mean_overlap(self) -> tuple[float, float] | None:
        """The share over all pairs of layers, and that by chance; None without pairs."""
        if not self.overlaps:
            return None
        count = len(self.overlaps)
        return (
            sum(one.share for one in self.overlaps) / count,
            sum(one.by_chance for one in self.overlaps) / count,
        )

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        document = asdict(self)
        for entry, one in zip(document["traffic"], self.traffic, strict=True):
            entry["hit_rate"] = one.hit_rate
        share, chance = self.mean_overlap or (None, None)
        return document | {"mean_overlap": share, "mean_overlap_by_chance": chance}


def summarise(trace: RoutingTrace) -> TraceSummary:
    """Usage of experts, and the traffic of a cache that holds a quarter, half, three quarters and
    all of them."""
    total = sum(one.experts * one.expert_bytes for one in trace.layers.values())
    known = all(one.expert_bytes for one in trace.layers.values())
    traffic = [expert_traffic(trace, int(share * total)) for share in CACHE_SHARES] if known else []
    layers = tuple(_layer(trace, layer) for layer in trace.layers)
    return TraceSummary(
        trace.family,
        trace.source,
        len(trace.tokens),
        len(trace.starts),
        total,
        layers,
        tuple(traffic),
        _overlaps(trace),
    )


def _overlaps(trace: RoutingTrace) -> tuple[Overlap, ...]:
    masks = {layer: trace.layers[layer].mask() for layer in sorted(trace.layers)}  # bool (N, E)
    return tuple(
        _overlap(layer, following, masks[layer], masks[following])
        for layer, following in pairwise(masks)
        if masks[layer].shape == masks[following].shape
    )


def _overlap(layer: int, following: int, chosen: np.ndarray, then: np.ndarray) -> Overlap:
    """Of the choices `[N,E]` of two layers."""
    choices = max(chosen.sum(), 1)
    by_chance = chosen.sum(0) @ then.mean(0) / choices
    return Overlap(layer, following, float((chosen & then).sum() / choices), float(by_chance))


def relative_entropy(usage: np.ndarray) -> float:
    """Entropy of the shares `(E,)`, which sum to 1, over that of even use: 0 to 1."""
    seen = usage[usage > 0]
    return float(-(seen * np.log(seen)).sum() / math.log(len(usage))) if len(usage) > 1 else 1.0


def _layer(trace: RoutingTrace, layer: int) -> LayerStatistics:
    routing = trace.layers[layer]
    mask = routing.mask()
    counts = mask.sum(0)
    usage = counts / max(counts.sum(), 1)
    follows = np.ones(len(mask), bool)
    follows[trace.starts] = False
    rows = np.flatnonzero(follows)
    again = (mask[rows] & mask[rows - 1]).sum()
    repeated = float(again / max(mask[rows].sum(), 1)) if len(rows) else None
    sums = routing.weights.sum(1)
    top = float((routing.weights.max(1) / np.where(sums > 0, sums, 1)).mean())
    return LayerStatistics(
        layer,
        routing.experts,
        routing.chosen.shape[1],
        tuple(usage.tolist()),
        relative_entropy(usage),
        repeated,
        top,
    )
