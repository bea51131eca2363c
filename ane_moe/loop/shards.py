"""The shards of a conversion, loaded: what a token loop needs, from `runtime_meta.json` alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ane_moe.errors import UserError
from ane_moe.loop.buffers import rope_tables
from ane_moe.loop.embedding_table import EmbeddingTable, open_embeddings
from ane_moe.loop.eviction import DEFAULT_POLICY
from ane_moe.loop.expert_cache import ExpertCache
from ane_moe.loop.expert_source import check_function
from ane_moe.loop.experts import ExpertLayer, expert_layers, open_cache
from ane_moe.loop.memory_budget import MB, Budget, budget_of
from ane_moe.manifest import Manifest, Shard, read_manifest
from ane_moe.runtime import open_package, session_options, with_precision
from ane_moe.runtime.interface import LoadedFunction

# Upper limits of what a manifest may ask the host to allocate; an order of magnitude above any
# model supported.
MAX_SIZES = {
    "d_model": 1 << 17,
    "vocab": 1 << 22,
    "context": 1 << 21,
    "cache_width": 1 << 21,
    "prefill": 1 << 14,
}
HALVES = ("attn", "ffn")  # of a layer: scopes of shards


@dataclass(frozen=True)
class LoadedShard:
    """One package: its functions by name (`decode` and, where the conversion has it, `prefill`; or
    `tail`)."""

    shard: Shard
    functions: dict[str, LoadedFunction]


# What the host calls: the functions of a shard, or experts by the tokens that chose them.
Step = LoadedShard | ExpertLayer


@dataclass(frozen=True)
class LoadedShards:
    """Everything sessions share; nothing here changes once loaded. `steps` are in the order of
    calls; `embed` gives fp16 `[vocab, d]`; `ropes` are the rows of every rotary table by slot;
    `runtime` is the one that was chosen."""

    folder: Path
    manifest: Manifest
    runtime: str
    steps: tuple[Step, ...]
    embed: EmbeddingTable
    ropes: dict[str, np.ndarray]
    cache: ExpertCache | None = None  # of expert functions, where there are any
    budget: Budget | None = None  # where experts lie in stores

    @property
    def loaded(self) -> list[LoadedShard]:
        """The shards whose functions are called for all tokens."""
        return [step for step in self.steps if isinstance(step, LoadedShard)]

    @property
    def body(self) -> list[Step]:
        """The steps of the layers."""
        return [
            step for step in self.steps if isinstance(step, ExpertLayer) or step.shard.rows is None
        ]

    @property
    def tail(self) -> list[Step]:
        """Those of them that a prompt's last token goes through after prefill."""
        return [step for step in self.body if isinstance(step, LoadedShard) and step.shard.has_tail]

    @property
    def prefill(self) -> list[Step]:
        """Those of them that all tokens of a prompt go through."""
        return [
            step for step in self.body if isinstance(step, ExpertLayer) or not step.shard.is_tail
        ]

    @property
    def head(self) -> list[LoadedShard]:
        """The shards that give scores."""
        return [loaded for loaded in self.loaded if loaded.shard.rows is not None]

    @property
    def experts(self) -> dict[int, ExpertLayer]:
        """Dispatched experts, by layer."""
        return {step.layer: step for step in self.steps if isinstance(step, ExpertLayer)}


def load_shards(
    folder: Path,
    runtime: str = "auto",
    *,
    precision: str = "fp32",
    expert_cache_bytes: int | None = None,
    expert_policy: str = DEFAULT_POLICY,
    memory_mb: float | None = None,
    adapter: str | None = None,
    direct: bool = False,
    **options: Any,
) -> LoadedShards:
    """Load every shard of the conversion in `folder`; `options` go to the runtime, and `precision`,
    as of `with_precision`.

    Expert functions are loaded when first called, and kept within `expert_cache_bytes` (None: all
    of them), by the `expert_policy`, a key of POLICIES in `loop/eviction.py`. Weights of all
    shards, as stored and as the runtime expands them, take `memory_mb` (10^6 bytes) where there is
    a limit. Experts of stores take what that leaves (None: half of what is free); the stores are
    read around the page cache where `direct`. `adapter` is one of those that were converted with
    the model, by its name, and switched on.

    Raises UserError when the folder is no finished conversion, lacks a shard, or a function's
    inputs are not what the manifest implies, and when the limit leaves no room for an expert.
    """
    manifest = read_manifest(folder).with_adapter(adapter)
    check_manifest(manifest, folder)
    _require_whole(manifest, folder)
    runtime, computed = with_precision(runtime, precision, manifest.package_form)
    stored = stored_bytes(folder, manifest)
    limits = _limits(folder, manifest, stored, memory_mb, expert_cache_bytes)
    options |= computed | session_options(runtime, limits.memory_mb, stored)
    experts = expert_layers(manifest)
    steps = tuple(
        experts[step] if isinstance(step, int) else _loaded(folder, step, runtime, options)
        for step in call_order(manifest)
    )
    cache = None
    if experts:
        kept = (limits.expert_bytes, expert_policy)
        cache = open_cache(folder, manifest, runtime, *kept, direct=direct, **options)
    embed, ropes = open_embeddings(folder, manifest), rope_tables(manifest)
    return LoadedShards(folder, manifest, runtime, steps, embed, ropes, cache, limits.budget)


@dataclass(frozen=True)
class _Limits:
    """What weights may take: `memory_mb` packages and what the runtime expands of them,
    `expert_bytes` the experts that are kept (None: no limit); and how memory was divided, where
    experts lie in stores."""

    memory_mb: float | None
    expert_bytes: int | None
    budget: Budget | None = None


def _limits(
    folder: Path, manifest: Manifest, stored: int, memory_mb: float | None, expert_bytes: int | None
) -> _Limits:
    """The limits that were asked for; of stores, what both leave. `stored`: bytes of packages.
    Raises UserError as `budget_of`."""
    if not any(shard.store for shard in manifest.shards):
        return _Limits(memory_mb, expert_bytes)
    limit = None if memory_mb is None else int(memory_mb * MB)
    budget = budget_of(manifest.shards, table_bytes(folder, manifest), limit)
    packages_mb = None if limit is None else (stored + budget.expanded) / MB
    return _Limits(packages_mb, min(expert_bytes or budget.experts, budget.experts), budget)


def _loaded(folder: Path, shard: Shard, runtime: str, options: dict[str, Any]) -> LoadedShard:
    package = open_package(folder / shard.path, runtime, **options)
    functions = {entry.name: package.function(entry.entry) for entry in shard.functions}
    loaded = LoadedShard(shard, functions)
    check_shard(loaded, folder)
    return loaded


def _require_whole(manifest: Manifest, folder: Path) -> None:
    if not is_whole(manifest):
        raise UserError(
            f"{folder} holds a part of the model only",
            f"{len(manifest.layers)} of {manifest.n_layers} layers",
            "convert without --layers",
        )


def table_bytes(folder: Path, manifest: Manifest) -> int:
    """What the embedding table takes."""
    return (folder / manifest.embed).stat().st_size if manifest.embed else 0


def stored_bytes(folder: Path, manifest: Manifest) -> int:
    """What the packages of a conversion take on disk."""
    files = (path for shard in manifest.shards for path in (folder / shard.path).rglob("*"))
    return sum(path.stat().st_size for path in files if path.is_file())


def call_order(manifest: Manifest) -> list[Shard | int]:
    """Shards in the order in which they are called; for packages of experts the layer, once."""
    order: list[Shard | int] = []
    for shard in manifest.shards:
        if not shard.dispatched:
            order.append(shard)
        elif shard.layer is not None and shard.layer not in order:
            order.append(shard.layer)
    return order


def is_whole(manifest: Manifest) -> bool:
    """Whether all layers of the model were converted: only then there is a head, and text to
    get."""
    return len(manifest.layers) == manifest.n_layers


def check_manifest(manifest: Manifest, folder: Path) -> None:
    """Raise UserError when sizes are out of range, a layer has no shard, or a whole model's head
    has gaps."""
    for name, limit in MAX_SIZES.items():
        size = getattr(manifest, name)
        if not isinstance(size, int) or not (0 if name == "prefill" else 1) <= size <= limit:
            raise UserError(
                f"{folder}: {name} is out of range", repr(size), f"at most {limit} is supported"
            )
    if manifest.context > manifest.cache_width:
        raise UserError(
            f"{folder}: the context does not fit into the cache",
            f"context {manifest.context}, cache {manifest.cache_width}",
            "convert again",
        )
    for layer in manifest.layers:
        _check_layer(manifest, layer, folder)
    if is_whole(manifest):
        _check_head([shard for shard in manifest.shards if shard.rows], manifest.scores, folder)


def _check_layer(manifest: Manifest, layer: int, folder: Path) -> None:
    """A layer has shards for both its halves, where it has both, or one for all of it; each cut one
    is complete."""
    if any(layer in shard.layers for shard in manifest.shards):
        return
    own = [shard for shard in manifest.shards if shard.layer == layer]
    for scope in manifest.halves.get(str(layer), HALVES):
        _require_parts(
            [shard for shard in own if shard.scope == scope], f"{folder}: layer {layer} ({scope})"
        )


def _check_head(head: list[Shard], scores: int, folder: Path) -> None:
    _require_parts(head, f"{folder}: lm_head")
    ends = [0, *(shard.rows[1] if shard.rows else -1 for shard in head)]
    starts = [*(shard.rows[0] if shard.rows else -1 for shard in head), scores]
    if ends != starts:
        raise UserError(
            f"{folder}: the head's parts do not cover all scores",
            f"rows {[s.rows for s in head]}",
            f"0 to {scores} is needed; convert all of it",
        )


def check_shard(loaded: LoadedShard, folder: Path) -> None:
    """Raise UserError unless every function declares exactly the inputs that the manifest says."""
    for entry in loaded.shard.functions:
        check_function(
            loaded.functions[entry.name],
            entry,
            f"{folder / loaded.shard.path}: function {entry.name}",
        )


def _require_parts(shards: list[Shard], what: str) -> None:
    """Shards must be parts 0..parts-1 of one whole."""
    shards = sorted(shards, key=lambda shard: shard.part)
    if not shards or [shard.part for shard in shards] != list(range(shards[0].parts)):
        found = (
            f"parts {[shard.part for shard in shards]} of {shards[0].parts}"
            if shards
            else "no shard"
        )
        raise UserError(f"{what} is incomplete", found, "convert again")
