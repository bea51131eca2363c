"""Dispatch of experts by the host: the functions that gates choose, on the tokens that chose them,
and no others.

T = tokens in the call, d = d_model, E = experts of the layer, G = experts of one function (a
group), B = a bucket: a token count functions exist for. The manifest says which experts each
function computes: none, where every token passes through it (the shared expert). Each maps
`ffn_input [1,d,1,B]` and `gate [1,1,1,B]` (`gates [1,G,1,B]` where G is above 1; nothing for
shared) to `y [1,d,1,B]`.
"""

import threading
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ane_moe.errors import UserError
from ane_moe.loop.buffers import by_channel
from ane_moe.loop.eviction import DEFAULT_POLICY
from ane_moe.loop.expert_cache import Eviction, ExpertCache, FunctionKey
from ane_moe.loop.expert_source import PackageSource, Sources
from ane_moe.loop.expert_store import READERS, StoreSource
from ane_moe.loop.figures import CallClock
from ane_moe.manifest import Manifest, Shard, ShardFunction
from ane_moe.model.port import FFN_INPUT, GATES, Port, Shape

KIND = "experts"


@dataclass(frozen=True)
class Group:
    """Experts of one function, in order (none: the shared one), and the function for each
    bucket."""

    experts: tuple[int, ...]
    path: str
    functions: dict[int, ShardFunction]
    stored: bool = False  # in a store, where one expert in memory serves all buckets

    def key(self, tokens: int) -> FunctionKey:
        bucket = min(self.functions) if self.stored else tokens
        return FunctionKey(self.path, self.functions[bucket].entry)

    def pieces(self, tokens: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        """Cut token indices so that each piece fits a bucket, the smallest that holds it; none is
        left out."""
        buckets = sorted(self.functions)
        for first in range(0, len(tokens), buckets[-1]):
            piece = tokens[first : first + buckets[-1]]
            yield piece, buckets[bisect_left(buckets, len(piece))]


@dataclass(frozen=True)
class ExpertLayer:
    """The expert functions of one layer: groups in the order of their experts. `experts` is how
    many the layer has (None: as many as gates); rows of the gates after theirs are of choices that
    compute nothing."""

    layer: int
    groups: tuple[Group, ...]
    shared: Group | None
    experts: int | None = None

    @property
    def all_groups(self) -> tuple[Group, ...]:
        """The groups, and the shared one last where there is one."""
        return (*self.groups, *([self.shared] if self.shared else []))

    @cached_property
    def entry(self) -> ShardFunction:
        """One of the functions: their slots are those of all."""
        return next(iter(self.groups[0].functions.values()))

    @cached_property
    def source(self) -> str:
        """The slot of the normed stream that they are given."""
        return next(port.slot for port in self.entry.ports.inputs if port.root == FFN_INPUT)

    @cached_property
    def target(self) -> str:
        """The slot that they add to."""
        return self.entry.ports.outputs[0].slot

    @cached_property
    def _holder(self) -> dict[int, int]:
        return {
            expert: index for index, group in enumerate(self.groups) for expert in group.experts
        }

    def groups_of(self, experts: Iterable[int]) -> list[Group]:
        """Groups that hold `experts`, each once, in order. Raises UserError for an expert that none
        holds."""
        try:
            return [
                self.groups[index] for index in sorted({self._holder[expert] for expert in experts})
            ]
        except KeyError as error:
            raise UserError(
                f"layer {self.layer}: the gates choose an expert that no package holds",
                f"expert {error}",
                "run `ane-moe verify`, or convert again",
            ) from None


def expert_layers(manifest: Manifest) -> dict[int, ExpertLayer]:
    """Every layer whose experts are dispatched. Raises UserError for a package whose functions do
    not fit together."""
    layers = {}
    for layer in manifest.layers:
        own = (shard for shard in manifest.shards if shard.dispatched and shard.layer == layer)
        groups = [group for shard in own for group in _groups(shard)]
        if groups:
            _require_once(groups, layer)
            routed = sorted(
                (group for group in groups if group.experts), key=lambda group: group.experts[0]
            )
            shared = next((group for group in groups if not group.experts), None)
            experts = manifest.moe.get(str(layer), {}).get("experts")
            layers[layer] = ExpertLayer(layer, tuple(routed), shared, experts)
    return layers


def _groups(shard: Shard) -> list[Group]:
    """The groups of one package, and their functions by token count."""
    groups = [
        Group(
            experts,
            shard.path,
            {function.tokens: function for function in functions},
            shard.store is not None,
        )
        for experts, functions in shard.copies.items()
    ]
    if len({frozenset(group.functions) for group in groups}) != 1:
        found = "some experts have other token counts than others"
        raise UserError(f"{shard.path} lacks an expert function", found, "convert again")
    return groups


def _require_once(groups: Sequence[Group], layer: int) -> None:
    """Each expert belongs to one group, and groups are in rising order."""
    experts = [expert for group in groups for expert in group.experts]
    sorted_groups = all(group.experts == tuple(sorted(group.experts)) for group in groups)
    if not experts or len(set(experts)) != len(experts) or not sorted_groups:
        found = f"functions for {[group.experts for group in groups]}"
        raise UserError(
            f"layer {layer}: experts and functions do not fit together", found, "convert again"
        )


class Scratch(threading.local):
    """Inputs of expert calls, one set for those of the same shapes, in each thread. What fits a
    call as it is goes in as it is; all else is copied."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, Shape], np.ndarray] = {}

    def features(
        self,
        function: ShardFunction,
        values: Mapping[str, np.ndarray],
        clock: CallClock | None = None,
    ) -> dict[str, np.ndarray]:
        """The inputs of `function`: `values [C,n]` by the root of the slot, and zeros up to its T
        tokens. `clock` is told of copies."""
        return {
            port.name: self._input(port, values[port.root], clock) for port in function.ports.inputs
        }

    def _input(self, port: Port, value: np.ndarray, clock: CallClock | None) -> np.ndarray:
        array = self._made.get((port.name, port.shape))
        if array is None:
            array = self._made[port.name, port.shape] = np.zeros(port.shape, np.float16)
        if value.size == array.size and value.dtype == array.dtype and value.flags.c_contiguous:
            return value.reshape(port.shape)
        columns = by_channel(array)
        columns[:, : value.shape[1]] = value
        columns[:, value.shape[1] :] = 0
        if clock:
            clock.copied(value.nbytes)
        return array


class ExpertDispatch:
    """Runs chosen experts, `concurrency` of a layer at a time; sums in the order of experts, so the
    result is the same. Layers may be added to at once."""

    def __init__(
        self, layers: dict[int, ExpertLayer], cache: ExpertCache, concurrency: int = 1
    ) -> None:
        if concurrency < 1:
            raise UserError("concurrency must be at least 1", str(concurrency))
        self.layers = layers
        self.cache = cache
        self._pool = ThreadPoolExecutor(concurrency, "expert") if concurrency > 1 else None
        self._scratch = Scratch()

    def chosen(self, layer: int, gates: np.ndarray) -> list[int]:
        """Experts of a layer with a gate other than zero in `gates [E,T]`, in order."""
        return np.flatnonzero((gates[: self.layers[layer].experts] != 0).any(axis=1)).tolist()

    def add(
        self,
        layer: int,
        experts: Sequence[int],
        ffn_input: np.ndarray,
        gates: np.ndarray,
        total: np.ndarray,
        clock: CallClock,
    ) -> None:
        """Add to `total [d,T]` (fp32 or fp64) what `experts` and the shared one give for
        `ffn_input [d,T]` under `gates [E,T]`.

        Raises UserError when an expert has no function or its function cannot be loaded.
        """
        table = self.layers[layer]
        tasks = [
            (group, np.flatnonzero((gates[list(group.experts)] != 0).any(axis=0)))
            for group in table.groups_of(experts)
        ]
        if table.shared:
            tasks.append((table.shared, np.arange(ffn_input.shape[1])))

        def run(task: tuple[Group, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
            return self._run(*task, ffn_input, gates, clock)

        keys = self._keys(tasks)
        with self.cache.running(layer, keys):
            self.cache.request(keys)
            for results in (self._pool.map if self._pool else map)(run, tasks):
                for tokens, y in results:
                    total[:, tokens] += y

    def _keys(self, tasks: Sequence[tuple[Group, np.ndarray]]) -> list[FunctionKey]:
        """Of the functions that groups call for their tokens, each once, in that order."""
        keys = (group.key(bucket) for group, tokens in tasks for _, bucket in group.pieces(tokens))
        return list(dict.fromkeys(keys))

    def load_ahead(
        self, guesses: Sequence[tuple[int, Sequence[int]]], current: tuple[int, Sequence[int]]
    ) -> None:
        """Load the functions for one token of `guesses`, layers and their experts, in the
        background and in this order, at no cost of those in use now: `current` is the running layer
        and its experts."""
        self.cache.load_ahead(
            [key for layer, experts in guesses for key in self._for_one(layer, experts)],
            self._for_one(*current),
        )

    def resident(self, layer: int, experts: Sequence[int]) -> float:
        """The share of these experts whose functions for one token are loaded, or being loaded."""
        return self.cache.resident(self._for_one(layer, experts))

    def _for_one(self, layer: int, experts: Sequence[int]) -> list[FunctionKey]:
        """Of the functions of some experts for one token."""
        groups = self.layers[layer].groups_of(experts)
        return [group.key(min(group.functions)) for group in groups]

    def _run(
        self,
        group: Group,
        tokens: np.ndarray,
        ffn_input: np.ndarray,
        gates: np.ndarray,
        clock: CallClock,
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Pieces of `tokens` with their `y [d,piece]`."""
        results, own = [], _rows(gates, group.experts)
        for piece, bucket in group.pieces(tokens):
            given = {FFN_INPUT: _taken(ffn_input, piece), GATES: _taken(own, piece)}
            features = self._scratch.features(group.functions[bucket], given, clock)
            with self.cache.hold(group.key(bucket), clock) as function:
                started = clock.start()
                try:
                    outputs = function.predict(features)
                finally:
                    clock.stop(KIND, started)
            results.append((piece, by_channel(outputs["y"])[:, : len(piece)]))
        return results


def _taken(values: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The columns of `values [C,T]` of some tokens: themselves where it is all of them."""
    return values if len(tokens) == values.shape[1] else values[:, tokens]


def _rows(gates: np.ndarray, experts: tuple[int, ...]) -> np.ndarray:
    """The rows of neighbours as they lie in `gates [E,T]`, of others a copy."""
    first, count = (experts[0], len(experts)) if experts else (0, 0)
    neighbours = experts == tuple(range(first, first + count))
    return gates[first : first + count] if neighbours else gates[list(experts)]


def open_cache(
    folder: Path,
    manifest: Manifest,
    runtime: str,
    limit_bytes: int | None,
    policy: str = DEFAULT_POLICY,
    *,
    direct: bool = False,
    **options: Any,
) -> ExpertCache:
    """A cache over the experts of the conversion in `folder`: functions of its packages, and stores
    (read around the page cache where `direct`). They leave by the `policy`, a key of POLICIES in
    `loop/eviction.py`.

    Loading reads the weights. It raises UserError when a package or a store is damaged, or lacks a
    function or has it with other inputs than the manifest implies, and when the limit is below the
    size of one function.
    """
    layers = expert_layers(manifest)
    groups = [group for layer in layers.values() for group in layer.all_groups]
    entries = {
        group.key(tokens): entry
        for group in groups
        if not group.stored
        for tokens, entry in group.functions.items()
    }
    eviction = Eviction(
        {
            group.key(tokens): number
            for number, layer in layers.items()
            for group in layer.all_groups
            for tokens in group.functions
        },
        policy,
    )

    packages = PackageSource(folder, entries, runtime, **options)
    if not any(shard.store for shard in manifest.shards):
        return ExpertCache(packages.load, packages.size, limit_bytes, eviction)
    stores = StoreSource(folder, manifest, runtime, direct, **options)
    source = Sources(packages, dict.fromkeys(stores.paths, stores))
    return ExpertCache(
        source.load,
        source.size,
        limit_bytes,
        eviction,
        release=source.release,
        readers=READERS,
    )
