"""PT-MoE: tracks that meet every few layers; of four layers three have a window and rotation, every
other one has experts of its track.

Source: arXiv 2602.07306 and 2507.13575. No checkpoints are public: `original/pt_moe.py` says how
one is laid out.
"""

from typing import Any

from ane_moe.families.config import MAX_LAYERS, Config
from ane_moe.families.decoder import (
    FULL,
    ROPE,
    SLIDING,
    gqa,
    layer_kinds,
    layer_windows,
    llama,
    mlp,
    router,
)
from ane_moe.families.qwen3_moe import KEYS as KEYS
from ane_moe.families.taps import Taps
from ane_moe.model.spec import FfnSpec, LayerSpec, ModelSpec, MoeSpec, TrackSpec

TAPS = Taps()
MAX_TRACKS = 64
REDUCE = ("mean", "sum")
# Layers, heads and KV heads of the dense models of arXiv 2602.07306, of 8 tracks and the depths 2,
# 4 and 8. Channels of a head and the width of a track's MLP are ours, so that weights add up.
PUBLISHED = {
    "pt-6b": (32, 32, 8, 1408),
    "pt-13b": (40, 40, 8, 2080),
    "pt-30b": (48, 64, 8, 2368),
}
HEAD_DIM, TRACKS, DEPTHS = 128, 8, (2, 4, 8)


def published(name: str) -> dict[str, Any] | None:
    """The configuration of a published shape with a depth, such as `pt-6b-d4`."""
    shape, _, depth = name.rpartition("-d")
    if shape not in PUBLISHED or depth not in map(str, DEPTHS):
        return None
    layers, heads, kv_heads, width = PUBLISHED[shape]
    return {
        "model_type": "pt_moe",
        "vocab_size": 32000,
        "hidden_size": heads * HEAD_DIM,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "mlp_layer_types": ["dense"] * layers,
        "num_tracks": TRACKS,
        "track_depth": int(depth),
        "track_reduce": "mean",
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": HEAD_DIM,
        "sliding_window": 4096,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "max_position_embeddings": 65536,
        "tie_word_embeddings": False,
    }


def spec(config: Config) -> ModelSpec:
    tracks = _tracks(config)
    each = _layers(config, tracks.count)
    blocks = [each[first : first + tracks.depth] for first in range(0, len(each), tracks.depth)]
    layers = [layer for block in blocks for layer in block * tracks.count]
    return llama(config, layers, tracks=tracks)


def _tracks(config: Config) -> TrackSpec:
    config.only("track_reduce", *REDUCE)
    return TrackSpec(
        config.integer("num_tracks", at_most=MAX_TRACKS),
        config.integer("track_depth", at_most=MAX_LAYERS),
        config.values["track_reduce"],
    )


def _layers(config: Config, tracks: int) -> list[LayerSpec]:
    """The layers of one track: all have the same form."""
    heads = {}
    for ours, field in (("heads", "num_attention_heads"), ("kv_heads", "num_key_value_heads")):
        if config.integer(field) % tracks:
            raise config.wrong(field, f"a multiple of num_tracks = {tracks}")
        heads[ours] = config.integer(field) // tracks
    mixers = [
        gqa(config, window=window, rope=ROPE if window else None, **heads)
        for window in layer_windows(config, lambda n: FULL if n % 4 == 3 else SLIDING)
    ]
    return [LayerSpec(mixer, ffn) for mixer, ffn in zip(mixers, _ffns(config), strict=True)]


def _ffns(config: Config) -> list[FfnSpec]:
    kinds = layer_kinds(
        config,
        "mlp_layer_types",
        ("dense", "sparse"),
        lambda n: "sparse" if n % 2 else "dense",
    )
    found: dict[str, FfnSpec] = {}
    if "dense" in kinds:
        found["dense"] = mlp(config, "intermediate_size")
    if "sparse" in kinds:
        chosen = router(config, renorm=config.flag("norm_topk_prob"))
        found["sparse"] = MoeSpec(chosen, mlp(config, "moe_intermediate_size"))
    return [found[kind] for kind in kinds]
