"""Beam (Beam-1.0-501B-A23B): AFMoE's layer without shared experts, with gates biased by head, full
layers whose queries grow with the position, and additions to the stream that are weighed."""

from dataclasses import replace

from ane_moe.families.config import Config
from ane_moe.families.decoder import (
    SLIDING,
    decoder,
    gqa,
    layer_kinds,
    listed_dense,
    mlp,
    ropes_by_kind,
    sigmoid_router,
)
from ane_moe.families.keys import DEEPSEEK_FFN, LAYER, SKELETON, KeyTable
from ane_moe.families.taps import DEEPSEEK
from ane_moe.model.spec import GqaSpec, HeadSpec, LayerSpec, ModelSpec, MoeSpec, Temperature

KEYS: KeyTable = {
    **SKELETON,
    **{ours: entries for ours, entries in DEEPSEEK_FFN.items() if ".shared." not in ours},
    "layers.{layer}.attn.gate.weight": (f"{LAYER}.self_attn.gate_proj.weight",),
    "layers.{layer}.attn.gate_bias.weight": (f"{LAYER}.self_attn.gate_bias",),
    "layers.{layer}.attn.residual.after.weight": (f"{LAYER}.post_attention_layernorm.weight",),
    "layers.{layer}.ffn.norm.weight": (f"{LAYER}.pre_feedforward_layernorm.weight",),
    "layers.{layer}.ffn.residual.after.weight": (f"{LAYER}.post_feedforward_layernorm.weight",),
}
TAPS = replace(
    DEEPSEEK,
    ffn_norm="pre_feedforward_layernorm",
    after="post_feedforward_layernorm",
    nth=("attn_residual_add_idx", "mlp_residual_add_idx"),
)
GROWS = Temperature(2048, 0.1, power=True)  # which no file says (`compute_attention_scaling`)


def spec(config: Config) -> ModelSpec:
    kinds = layer_kinds(config)
    tables = config.values.get("rope_parameters")
    turned = [kind for kind in kinds if not isinstance(tables, dict) or tables.get(kind)]
    mixers = [_attention(config, kind, kind in turned) for kind in kinds]
    moe = MoeSpec(sigmoid_router(config), mlp(config, "moe_intermediate_size"))
    cap = "final_logit_softcapping"
    softcap = config.number(cap) if config.nullable(cap) else None
    layers = [
        LayerSpec(mixer, ffn, norms="around", nth=(2 * number + 2, 2 * number + 3))
        for number, (mixer, ffn) in enumerate(zip(mixers, listed_dense(config, moe), strict=True))
    ]
    return decoder(
        config,
        layers,
        ropes=ropes_by_kind(config, turned, mixers[0].head_dim, partial=False),
        head=HeadSpec(config.flag("tie_word_embeddings"), softcap=softcap),
    )


def _attention(config: Config, kind: str, turned: bool) -> GqaSpec:
    bias = config.flag("attention_bias")
    return gqa(
        config,
        qk_norm="head",
        qkv_bias=bias,
        o_bias=bias,
        gate="sigmoid",
        gate_bias=True,
        window=config.integer("sliding_window") if kind == SLIDING else None,
        rope=kind if turned else None,
        temperature=None if turned else GROWS,
    )
