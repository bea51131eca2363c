"""What the cache of expert functions would do with a trace: its own rules, played through without a
model.

E = experts, k = experts per token.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ane_moe.errors import UserError
from ane_moe.routing.routing_trace import RoutingTrace

Groups = Sequence[Sequence[int]]  # experts of each function of a layer


@dataclass(frozen=True)
class ExpertTraffic:
    """Decoding `tokens` tokens one by one through a cache of `cache_bytes` (None: no limit).
    Figures per token are means. `hit_rate` is that of all tokens, an empty cache's first misses
    included.
    """

    tokens: int
    cache_bytes: int | None
    functions_per_token: float
    hits: int
    misses: int
    bytes_loaded_per_token: float
    bytes_read_per_token: float  # weights of all functions called, loaded before or not

    @property
    def hit_rate(self) -> float:
        calls = self.hits + self.misses
        return self.hits / calls if calls else 0.0


def expert_traffic(
    trace: RoutingTrace,
    cache_bytes: int | None,
    groups: Mapping[int, Groups] | None = None,
    function_bytes: Mapping[int, int] | None = None,
) -> ExpertTraffic:
    """Play the trace through a cache that drops the least recently used function first, as
    `ExpertCache` does.

    `groups` gives each layer's functions (None: one expert each), `function_bytes` what a function
    takes (None: the experts' own bytes). Raises UserError when a function is larger than the cache,
    or its size is unknown.
    """
    sizes = {layer: _function_bytes(trace, layer, groups, function_bytes) for layer in trace.layers}
    if (
        cache_bytes is not None
        and (largest := max(max(size) for size in sizes.values())) > cache_bytes
    ):
        raise UserError(
            "the expert cache is smaller than one expert function",
            f"{cache_bytes / 1e6:.2f} MB for {largest / 1e6:.2f} MB",
            "take a larger cache",
        )
    called = {layer: functions_called(trace, layer, groups) for layer in trace.layers}
    cache = _Cache(cache_bytes)
    read = 0
    for token in range(len(trace.tokens)):
        for layer, touched in called.items():
            for function in np.flatnonzero(touched[token]).tolist():
                cache.call((layer, function), sizes[layer][function])
                read += sizes[layer][function]
    count = len(trace.tokens)
    return ExpertTraffic(
        count,
        cache_bytes,
        (cache.hits + cache.misses) / count,
        cache.hits,
        cache.misses,
        cache.loaded / count,
        read / count,
    )


def functions_called(
    trace: RoutingTrace, layer: int, groups: Mapping[int, Groups] | None = None
) -> np.ndarray:
    """Which functions of the layer each token calls, bool `[N,functions]`, in the order of their
    first experts."""
    mask = trace.layers[layer].mask()
    if groups is None:
        return mask
    ordered = sorted((sorted(group) for group in groups[layer]), key=lambda group: group[0])
    return np.stack([mask[:, group].any(1) for group in ordered], axis=1)


def _function_bytes(
    trace: RoutingTrace,
    layer: int,
    groups: Mapping[int, Groups] | None,
    given: Mapping[int, int] | None,
) -> list[int]:
    one = trace.layers[layer]
    each = one.expert_bytes if given is None else given[layer]
    if not each:
        raise UserError(
            f"the trace does not say what an expert of layer {layer} takes",
            "0 bytes",
            "trace a checkpoint, or shards of masked or sparse routing",
        )
    if groups is None:
        return [each] * one.experts
    ordered = sorted((sorted(group) for group in groups[layer]), key=lambda group: group[0])
    return [each * (len(group) if given is None else 1) for group in ordered]


class _Cache:
    """Least recently used first out; counts as `ExpertCache` does without loads ahead."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._held: OrderedDict[tuple[int, int], int] = OrderedDict()
        self._resident = 0
        self.hits = self.misses = self.loaded = 0

    def call(self, function: tuple[int, int], size: int) -> None:
        if function in self._held:
            self._held.move_to_end(function)
            self.hits += 1
            return
        self.misses += 1
        while self._limit is not None and self._resident + size > self._limit:
            self._resident -= self._held.popitem(last=False)[1]
        self._held[function] = size
        self._resident += size
        self.loaded += size
