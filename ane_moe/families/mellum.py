"""Mellum 2 (Mellum2-12B-A2.5B): Qwen3-MoE's layer, with windows and a rotary table by kind of
layer."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import (
    SLIDING,
    decoder,
    gqa,
    layer_kinds,
    listed_dense,
    mlp,
    ropes_by_kind,
    router,
)
from ane_moe.families.keys import KeyTable
from ane_moe.families.qwen3_moe import KEYS as QWEN3_MOE
from ane_moe.families.taps import Taps
from ane_moe.model.spec import LayerSpec, ModelSpec, MoeSpec

KEYS: KeyTable = QWEN3_MOE
TAPS = Taps()


def spec(config: Config) -> ModelSpec:
    bias = config.flag("attention_bias")
    kinds = layer_kinds(config)
    mixers = [
        gqa(
            config,
            qk_norm="head",
            qkv_bias=bias,
            o_bias=bias,
            rope=kind,
            window=config.integer("sliding_window") if kind == SLIDING else None,
        )
        for kind in kinds
    ]
    moe = MoeSpec(
        router(config, renorm=config.flag("norm_topk_prob")), mlp(config, "moe_intermediate_size")
    )
    ffns = listed_dense(config, moe)
    layers = [LayerSpec(mixer, ffn) for mixer, ffn in zip(mixers, ffns, strict=True)]
    ropes = ropes_by_kind(config, kinds, mixers[0].head_dim, partial=False)
    return decoder(config, layers, ropes=ropes)
