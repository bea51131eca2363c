"""What the cache of expert functions would do with a trace: its own rules, played through without a
model.

E = experts, k = experts per token.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ane_moe.errors import UserError
from ane_moe.loop.eviction import DEFAULT_POLICY, POLICIES, Belady, LeastRecent
from ane_moe.routing.routing_trace import RoutingTrace

Groups = Sequence[Sequence[int]]  # experts of each function of a layer
NEVER = np.iinfo(np.int64).max  # above any rank


BELADY = "belady"  # the policy that knows what is to come


@dataclass(frozen=True)
class ExpertTraffic:
    """Decoding `tokens` tokens one by one through a cache of `cache_bytes` (None: no limit), which
    drops functions by `policy`. Figures per token are means. `hit_rate` is that of all tokens, an
    empty cache's first misses included.
    """

    tokens: int
    cache_bytes: int | None
    policy: str
    functions_per_token: float
    hits: int
    misses: int
    bytes_loaded_per_token: float
    bytes_read_per_token: float  # weights of all functions called, loaded before or not

    @property
    def hit_rate(self) -> float:
        calls = self.hits + self.misses
        return self.hits / calls if calls else 0.0


@dataclass(frozen=True)
class FunctionCalls:
    """The functions that decoding a trace calls. They are numbered, layer after layer; `layers` and
    `sizes` (bytes) are of each of them, `touched` are layers and which of their functions each
    token calls, bool `[N,functions]`."""

    layers: np.ndarray
    sizes: np.ndarray
    touched: tuple[tuple[int, np.ndarray], ...]

    @property
    def tokens(self) -> int:
        return len(self.touched[0][1])

    @cached_property
    def firsts(self) -> dict[int, int]:
        """The number of each layer's first function."""
        counts = [touched.shape[1] for _, touched in self.touched]
        starts = np.cumsum([0, *counts[:-1]]).tolist()
        return {layer: start for (layer, _), start in zip(self.touched, starts, strict=True)}

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        """In the order in which they run: each layer of each token, and what it calls."""
        return iter(self._steps)

    @cached_property
    def _steps(self) -> list[tuple[int, list[int]]]:
        return list(self._in_order())

    def _in_order(self) -> Iterator[tuple[int, list[int]]]:
        rows = [(layer, self.firsts[layer], touched) for layer, touched in self.touched]
        for token in range(self.tokens):
            for layer, first, touched in rows:
                yield layer, (np.flatnonzero(touched[token]) + first).tolist()

    def policy(self, name: str) -> LeastRecent:
        """A policy over these functions. Raises UserError for an unknown one."""
        if name == BELADY:
            return Belady(self.layers.tolist(), [call for _, calls in self for call in calls])
        if name not in POLICIES:
            known = ", ".join((*POLICIES, BELADY))
            raise UserError("there is no such expert policy", repr(name), f"choose from {known}")
        return POLICIES[name](self.layers.tolist())

    def require_room(self, cache_bytes: int | None) -> None:
        """Raise UserError when a function is larger than the cache."""
        largest = int(self.sizes.max())
        if cache_bytes is not None and largest > cache_bytes:
            raise UserError(
                "the expert cache is smaller than one expert function",
                f"{cache_bytes / 1e6:.2f} MB for {largest / 1e6:.2f} MB",
                "take a larger cache",
            )


def function_calls(
    trace: RoutingTrace,
    groups: Mapping[int, Groups] | None = None,
    function_bytes: Mapping[int, int] | None = None,
) -> FunctionCalls:
    """`groups` gives each layer's functions (None: one expert each), `function_bytes` what a
    function takes (None: the experts' own bytes). Raises UserError when a size is unknown."""
    sizes = {layer: _function_bytes(trace, layer, groups, function_bytes) for layer in trace.layers}
    touched = tuple((layer, functions_called(trace, layer, groups)) for layer in trace.layers)
    return FunctionCalls(
        np.repeat(list(sizes), [len(one) for one in sizes.values()]),
        np.concatenate(list(sizes.values())).astype(np.int64),
        touched,
    )


def expert_traffic(
    trace: RoutingTrace,
    cache_bytes: int | None,
    groups: Mapping[int, Groups] | None = None,
    function_bytes: Mapping[int, int] | None = None,
    policy: str = DEFAULT_POLICY,
) -> ExpertTraffic:
    """Play the trace through a cache that drops functions by `policy`, as `ExpertCache` does, or
    `belady`.

    `groups` and `function_bytes` are as for `function_calls`. Raises UserError when a function is
    larger than the cache, or its size is unknown, and for an unknown policy.
    """
    return played(function_calls(trace, groups, function_bytes), cache_bytes, policy)


def played(calls: FunctionCalls, cache_bytes: int | None, policy: str) -> ExpertTraffic:
    """The same of the calls themselves."""
    calls.require_room(cache_bytes)
    cache = PlayedCache(cache_bytes, calls.sizes, calls.policy(policy))
    read = 0
    for layer, functions in calls:
        cache.begin(layer, functions)
        for function in functions:
            cache.call(function)
        read += int(calls.sizes[functions].sum())
    return ExpertTraffic(
        calls.tokens,
        cache_bytes,
        policy,
        (cache.hits + cache.misses) / calls.tokens,
        cache.hits,
        cache.misses,
        cache.loaded / calls.tokens,
        read / calls.tokens,
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


class PlayedCache:
    """The rules of `ExpertCache`, over numbered functions of `sizes` bytes."""

    def __init__(self, limit: int | None, sizes: np.ndarray, policy: LeastRecent) -> None:
        self._limit = limit
        self._bytes = sizes.tolist()
        self._policy = policy
        self._needed = np.zeros(len(sizes), bool)  # by the running layer
        self._resident = 0
        self.held = np.zeros(len(sizes), bool)
        self.hits = self.misses = self.loaded = 0

    def begin(self, layer: int, functions: Sequence[int]) -> None:
        """`layer` runs, and calls `functions`."""
        self._policy.begin(layer)
        self._needed[:] = False
        self._needed[functions] = True

    def call(self, function: int) -> None:
        """It is used, and loaded before where it is not there."""
        found = bool(self.held[function])
        self.hits += found
        self.misses += not found
        if not found:
            self.enter(function)
        self.used(function)

    def used(self, function: int) -> None:
        """It is there, and called."""
        self._policy.called(function)

    def enter(self, function: int, kept: np.ndarray | None = None) -> list[int] | None:
        """Load it where there is room, or can be made of functions that are not `kept` (bool
        `[F]`); those that the running layer needs go last. Those that left; None: there was no
        room."""
        size = self._bytes[function]
        leaving = self._leaving(size, kept)
        if leaving is None:
            return None
        for one in leaving:
            self.held[one] = False
            self._resident -= self._bytes[one]
        self.held[function] = True
        self._resident += size
        self.loaded += size
        self._policy.entered(function)
        return leaving

    def _leaving(self, size: int, kept: np.ndarray | None) -> list[int] | None:
        if self._limit is None or (excess := self._resident + size - self._limit) <= 0:
            return []
        free = self.held if kept is None else self.held & ~kept
        ranks = self._policy.ranks()
        leaving = []
        for wanted in (free & ~self._needed, free & self._needed):
            left = np.where(wanted, ranks, NEVER)
            while excess > 0:
                function = int(left.argmin())
                if left[function] == NEVER:
                    break
                left[function] = NEVER
                leaving.append(function)
                excess -= self._bytes[function]
        return None if excess > 0 else leaving
