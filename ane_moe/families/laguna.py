"""Laguna (laguna-XS.2): attention whose output each head multiplies by a gate, windows, a number of
heads and a rotary table by layer, sigmoid scores with a bias for the choice, a shared expert."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import (
    SLIDING,
    decoder,
    gqa,
    layer_kinds,
    listed_dense,
    mlp,
    n_layers,
    ropes_by_kind,
    router,
)
from ane_moe.families.keys import DEEPSEEK_FFN, LAYER, SKELETON, KeyTable
from ane_moe.families.taps import Taps
from ane_moe.model.spec import GqaSpec, LayerSpec, ModelSpec, MoeSpec, SharedSpec

KEYS: KeyTable = {
    **SKELETON,
    **DEEPSEEK_FFN,
    "layers.{layer}.attn.gate.weight": (f"{LAYER}.self_attn.g_proj.weight",),
    "layers.{layer}.ffn.router.choice_bias": (
        f"{LAYER}.mlp.experts.e_score_correction_bias",
        f"{LAYER}.mlp.gate.e_score_correction_bias",
    ),
    **{
        f"layers.{{layer}}.ffn.shared.{name}.weight": (
            f"{LAYER}.mlp.shared_expert.{name}_proj.weight",
            f"{LAYER}.mlp.shared_experts.{name}_proj.weight",
        )
        for name in ("gate", "up", "down")
    },
}
TAPS = Taps(
    score="sigmoid",
    choice_bias="e_score_correction_bias",
)


def spec(config: Config) -> ModelSpec:
    config.only("moe_apply_router_weight_on_input", None, False)
    kinds = layer_kinds(config)
    mixers = [
        _attention(config, kind, heads) for kind, heads in zip(kinds, _heads(config), strict=True)
    ]
    capped = config.has("moe_router_logit_softcapping") and _positive(config)
    chosen = router(
        config,
        renorm=True,
        score="sigmoid",
        bias=True,
        scale=config.number("moe_routed_scaling_factor"),
        softcap=config.number("moe_router_logit_softcapping") if capped else None,
    )
    shared = SharedSpec(mlp(config, "shared_expert_intermediate_size"))
    ffns = listed_dense(config, MoeSpec(chosen, mlp(config, "moe_intermediate_size"), shared))
    layers = [LayerSpec(mixer, ffn) for mixer, ffn in zip(mixers, ffns, strict=True)]
    return decoder(config, layers, ropes=ropes_by_kind(config, kinds, mixers[0].head_dim))


def _positive(config: Config) -> bool:
    return config.values["moe_router_logit_softcapping"] != 0


def _heads(config: Config) -> tuple[int, ...]:
    """Query heads of each layer."""
    given, count = config.integers("num_attention_heads_per_layer"), n_layers(config)
    heads = given or (config.integer("num_attention_heads"),) * count
    kv_heads = config.integer("num_key_value_heads")
    if len(heads) != count or any(own < 1 or own % kv_heads for own in heads):
        raise config.wrong("num_attention_heads_per_layer", f"{count} multiples of {kv_heads}")
    return heads


def _attention(config: Config, kind: str, heads: int) -> GqaSpec:
    bias = config.flag("attention_bias")
    config.only("gating", True, "per-head", False, "per-element")
    return gqa(
        config,
        heads=heads,
        qk_norm="head",
        qkv_bias=bias,
        o_bias=bias,
        rope=kind,
        window=config.integer("sliding_window") if kind == SLIDING else None,
        gate="softplus",
        gate_by_head=config.values["gating"] in (True, "per-head"),
    )
