"""A part of a conversion to look at first: a few layers, slices of the head, experts and prompts.

Nothing here is drawn by chance: of the same conversion it is always the same part.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ane_moe.manifest import Manifest, Shard
from ane_moe.original.golden import OF_THE_LAYER, Golden, LayerGolden, arrays_of, layer_of
from ane_moe.verification.result import Sample

PROMPTS = 2
# What experts computed alone is not by token, or names tokens by their place among all of them.
BESIDE_TOKENS = (
    *OF_THE_LAYER,
    "sums",
    "inner",
    "ffn_input",
    "shared_output",
    "expert_tokens",
    "expert_outputs",
    "expert_gate",
)


def sampled_manifest(manifest: Manifest) -> Manifest:
    """The manifest of a few layers: the first, the first of every other kind and the last, and
    those whose keys and values they read; what computes their stored experts; and of the first and
    the last slice of the head."""
    layers = _layers(manifest)
    head = [shard for shard in manifest.shards if shard.rows]
    kept = {shard.path for shard in (*head[:1], *head[-1:])}
    kept |= {s.store.graph for s in manifest.shards if s.store and s.layer in layers}
    shards = [
        shard
        for shard in manifest.shards
        if shard.path in kept or {*shard.place(()).layers} & {*layers}
    ]
    covered = {layer for shard in shards for layer in shard.place(()).layers}
    return replace(manifest, shards=tuple(shards), layers=tuple(sorted(covered)))


def sample_of(
    whole: Manifest, looked_at: Manifest, prompts: tuple[int, int], captured: bool
) -> Sample:
    """What was looked at of a conversion; `prompts` are how many, and of how many."""
    return Sample(
        looked_at.layers,
        len(whole.layers),
        *prompts,
        tuple(shard.path for shard in looked_at.shards),
        len(whole.shards),
        captured and looked_at.layers != tuple(range(max(looked_at.layers) + 1)),
    )


def _layers(manifest: Manifest) -> list[int]:
    by_kind: dict[object, int] = {}
    for layer in manifest.layers:
        own = [shard for shard in manifest.shards if layer in shard.place(()).layers]
        by_kind.setdefault(frozenset(_kind(shard) for shard in own), layer)
    chosen = {*by_kind.values(), manifest.layers[-1]}
    read = {slot for shard in manifest.shards if shard.layer in chosen for slot in shard.borrowed}
    lenders = {shard.layer for slot, shard in manifest.lent.items() if slot in read}
    return sorted(chosen | {layer for layer in lenders if layer is not None})


def _kind(shard: Shard) -> tuple[str, frozenset[str]]:
    """What shards of like layers share: slots without the numbers of layers and tracks."""
    ports = shard.functions[0].ports
    slots = (port.slot for port in (*ports.inputs, *ports.outputs, *ports.states))
    own = "|".join(map(str, shard.place(()).layers))
    return shard.kind, frozenset(re.sub(rf"\.({own}|track_\d+)(?=\.|$)", "", s) for s in slots)


def sampled_prompts(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The places of a few prompts, in their order: the shortest of those that have a token to
    predict."""
    order = sorted(
        range(len(prompts)), key=lambda place: (len(prompts[place]) < 2, len(prompts[place]))
    )
    return sorted(order[:PROMPTS])


def golden_of(golden: Golden, places: Sequence[int], layers: Sequence[int]) -> Golden:
    """The golden of some of its prompts and layers."""
    rows = np.concatenate([np.arange(golden.spans[p].start, golden.spans[p].stop) for p in places])
    held = {layer: _rows(golden.layers[layer], rows) for layer in layers if layer in golden.layers}
    prompts = tuple(golden.prompts[place] for place in places)
    final = None if golden.final is None else golden.final[rows]
    return Golden(prompts, held, golden.logits[rows], golden.n_layers, final)


def _rows(layer: LayerGolden, rows: np.ndarray) -> LayerGolden:
    return layer_of(
        {
            name: value if name in BESIDE_TOKENS else value[rows]
            for name, value in arrays_of(layer).items()
        }
    )
