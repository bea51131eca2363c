"""The shards of a conversion, loaded: what a token loop needs, from `runtime_meta.json` alone."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ane_moe.errors import UserError
from ane_moe.loop.buffers import activation_shape, rope_rows
from ane_moe.loop.embedding_table import EmbeddingTable, open_embeddings
from ane_moe.loop.expert_cache import ExpertCache
from ane_moe.loop.experts import ExpertLayer, check_function, expert_layers, open_cache
from ane_moe.manifest import Manifest, Shard, read_manifest
from ane_moe.runtime import open_package, resolve_runtime
from ane_moe.runtime.interface import LoadedFunction

# Upper limits of what a manifest may ask the host to allocate; an order of magnitude above any model supported.
MAX_SIZES = {"d_model": 1 << 17, "vocab": 1 << 22, "context": 1 << 21, "cache_width": 1 << 21, "prefill": 1 << 14}


@dataclass(frozen=True)
class LoadedShard:
    """One package: its functions by name (`decode` and, where the conversion has it, `prefill`)."""

    shard: Shard
    functions: dict[str, LoadedFunction]


@dataclass(frozen=True)
class LoadedLayer:
    """A layer's attention shard and what follows it: the parts of a MoE or dense shard, whose outputs are added, or
    nothing where the host dispatches experts. Or a stack of layers from `index` on, which nothing follows."""

    index: int
    attn: LoadedShard
    ffn: tuple[LoadedShard, ...]


@dataclass(frozen=True)
class LoadedShards:
    """Everything sessions share; nothing here changes once loaded. `embed` gives fp16 `[vocab, d]`; `ropes` holds the
    (cos, sin) rows of every table, fp16 `[context, r/2]`; `runtime` is the one that was chosen."""

    folder: Path
    manifest: Manifest
    runtime: str
    layers: tuple[LoadedLayer, ...]
    head: tuple[LoadedShard, ...]
    embed: EmbeddingTable
    ropes: dict[str, tuple[np.ndarray, np.ndarray]]
    experts: dict[int, ExpertLayer] = field(default_factory=dict)
    cache: ExpertCache | None = None                # of expert functions, where there are any


def load_shards(folder: Path, runtime: str = "auto", *, expert_cache_bytes: int | None = None,
                **options: Any) -> LoadedShards:
    """Load every shard of the conversion in `folder`; `options` go to the runtime.

    Expert functions are loaded when first called, and kept within `expert_cache_bytes` (None: all of them).

    Raises UserError when the folder is no finished conversion, lacks a shard, or a function's inputs are not what
    the manifest implies.
    """
    manifest = read_manifest(folder)
    check_manifest(manifest, folder)
    if not is_whole(manifest):
        raise UserError(f"{folder} holds a part of the model only", f"{len(manifest.layers)} of {manifest.n_layers} "
                        "layers", "convert without --layers")
    runtime = resolve_runtime(runtime)

    def load(shard: Shard) -> LoadedShard:
        package = open_package(folder / shard.path, runtime, **options)
        functions = {function.name: package.function(function.name) for function in shard.functions}
        loaded = LoadedShard(shard, functions)
        check_shard(loaded, manifest, folder)
        return loaded

    layers = tuple(LoadedLayer(index, load(shard), tuple(load(part) for part in ffn_shards(manifest, index)))
                   for index in manifest.layers for shard in mixer_shards(manifest, index))
    head = tuple(load(shard) for shard in manifest.shards_of("lm_head"))
    experts = expert_layers(manifest)
    cache = open_cache(folder, manifest, experts, runtime, expert_cache_bytes, **options) if experts else None
    return LoadedShards(folder, manifest, runtime, layers, head, open_embeddings(folder, manifest),
                        {name: rope_rows(manifest, name) for name in manifest.ropes}, experts, cache)


def ffn_shards(manifest: Manifest, layer: int) -> list[Shard]:
    """The MoE parts of a layer, or its dense shard; empty where experts are dispatched by the host."""
    return manifest.shards_of("moe", layer) + manifest.shards_of("dense", layer)


def mixer_shards(manifest: Manifest, layer: int) -> list[Shard]:
    """The shard that begins a layer: its attention, or the stack it is the first layer of; none inside a stack."""
    return manifest.shards_of("attn", layer) + manifest.shards_of("stack", layer)


def is_whole(manifest: Manifest) -> bool:
    """Whether all layers of the model were converted: only then there is a head, and text to get."""
    return len(manifest.layers) == manifest.n_layers


def check_manifest(manifest: Manifest, folder: Path) -> None:
    """Raise UserError when sizes are out of range, a layer has no shard, or a whole model's head has gaps."""
    for name, limit in MAX_SIZES.items():
        size = getattr(manifest, name)
        if not isinstance(size, int) or not (0 if name == "prefill" else 1) <= size <= limit:
            raise UserError(f"{folder}: {name} is out of range", repr(size), f"at most {limit} is supported")
    if manifest.context > manifest.cache_width:
        raise UserError(f"{folder}: the context does not fit into the cache",
                        f"context {manifest.context}, cache {manifest.cache_width}", "convert again")
    for layer in manifest.layers:
        attention = mixer_shards(manifest, layer)
        if len(attention) != 1 and not (manifest.is_stacked(layer) and not attention):
            raise UserError(f"{folder}: layer {layer} needs one attention shard", str(len(attention)), "convert again")
        if attention and attention[0].rope is not None and attention[0].rope not in manifest.ropes:
            raise UserError(f"{folder}: layer {layer} names an unknown rotary table", attention[0].rope,
                            "convert again")
        if manifest.is_stacked(layer):
            continue
        parts = ffn_shards(manifest, layer) or manifest.shards_of("experts", layer)
        _require_parts(parts, f"{folder}: layer {layer}")
    if is_whole(manifest):
        _check_head(manifest.shards_of("lm_head"), manifest.vocab, folder)


def _check_head(head: list[Shard], vocab: int, folder: Path) -> None:
    _require_parts(head, f"{folder}: lm_head")
    ends = [0, *(shard.rows[1] if shard.rows else -1 for shard in head)]
    starts = [*(shard.rows[0] if shard.rows else -1 for shard in head), vocab]
    if ends != starts:
        raise UserError(f"{folder}: the head's parts do not cover the vocabulary", f"rows {[s.rows for s in head]}",
                        f"0 to {vocab} is needed; convert all of it")


def check_shard(loaded: LoadedShard, manifest: Manifest, folder: Path) -> None:
    """Raise UserError unless every function declares exactly the inputs and states that sessions pass."""
    for function in loaded.shard.functions:
        check_function(loaded.functions[function.name], input_shapes(loaded.shard, manifest, function.tokens),
                       f"{folder / loaded.shard.path}: function {function.name}")


def input_shapes(shard: Shard, manifest: Manifest, tokens: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the inputs of a shard's function for `tokens` tokens."""
    shapes: dict[str, tuple[int, ...]] = {"x": activation_shape(manifest, manifest.d_model, tokens)}
    if shard.kind not in ("attn", "stack"):
        return shapes
    if shard.rope is not None:
        half = len(manifest.ropes[shard.rope]["inv_freq"])
        shapes |= {"cos": (1, 1, half, tokens), "sin": (1, 1, half, tokens)}
    width = manifest.cache_width
    shapes |= {"mask": (1, 1, tokens, width), "write": (1, 1, tokens, width), "keep": (1, 1, 1, width)}
    return shapes | (shard.states if manifest.state == "explicit" else {})


def _require_parts(shards: list[Shard], what: str) -> None:
    """A layer's shards must be parts 0..parts-1 of one whole."""
    if not shards or [shard.part for shard in shards] != list(range(shards[0].parts)):
        found = f"parts {[shard.part for shard in shards]} of {shards[0].parts}" if shards else "no shard"
        raise UserError(f"{what} is incomplete", found, "convert again")
