"""LFM2-MoE (LFM2-8B-A1B): short convolutions with attention between them, a sigmoid router with a
bias for the choice, dense first layers."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import gqa, llama, n_layers, router
from ane_moe.families.keys import (
    LAYER,
    SKELETON,
    KeyTable,
    Rows,
    each_expert,
    expert_keys,
    fused_experts,
)
from ane_moe.families.taps import Taps
from ane_moe.model.short_conv import ShortConvSpec
from ane_moe.model.spec import LayerSpec, MixerSpec, MlpSpec, ModelSpec, MoeSpec

FFN = f"{LAYER}.feed_forward"
ATTENTION, CONV = "full_attention", "conv"

KEYS: KeyTable = {
    **SKELETON,
    "head.norm.weight": ("model.embedding_norm.weight",),
    "layers.{layer}.attn.norm.weight": (f"{LAYER}.operator_norm.weight",),
    "layers.{layer}.ffn.norm.weight": (f"{LAYER}.ffn_norm.weight",),
    "layers.{layer}.attn.q_norm.weight": (f"{LAYER}.self_attn.q_layernorm.weight",),
    "layers.{layer}.attn.k_norm.weight": (f"{LAYER}.self_attn.k_layernorm.weight",),
    **{
        f"layers.{{layer}}.attn.{name}.{kind}": (Rows(f"{LAYER}.conv.in_proj.{kind}", part, 3),)
        for part, name in enumerate("bcu")
        for kind in ("weight", "bias")
    },
    **{
        f"layers.{{layer}}.attn.conv.{kind}": (f"{LAYER}.conv.conv.{kind}",)
        for kind in ("weight", "bias")
    },
    "layers.{layer}.attn.o.weight": (
        f"{LAYER}.self_attn.out_proj.weight",
        f"{LAYER}.conv.out_proj.weight",
    ),
    "layers.{layer}.attn.o.bias": (f"{LAYER}.conv.out_proj.bias",),
    **{
        f"layers.{{layer}}.ffn.mlp.{ours}.weight": (f"{FFN}.{theirs}.weight",)
        for ours, theirs in {"gate": "w1", "up": "w3", "down": "w2"}.items()
    },
    "layers.{layer}.ffn.router.weight": (f"{FFN}.gate.weight",),
    "layers.{layer}.ffn.router.choice_bias": (f"{FFN}.expert_bias",),
    **expert_keys(
        each_expert("feed_forward.experts", "w1", "w3", "w2"),
        fused_experts("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
    ),
}
TAPS = Taps(ffn_norm="ffn_norm", score="sigmoid", choice_bias="expert_bias", up="w3", down="w2")


def spec(config: Config) -> ModelSpec:
    count, kinds = n_layers(config), config.strings("layer_types")
    if len(kinds) != count or set(kinds) - {ATTENTION, CONV}:
        raise config.wrong("layer_types", f"{count} of {ATTENTION} or {CONV}")
    mixers: dict[str, MixerSpec] = {
        ATTENTION: gqa(config, qk_norm="head"),
        CONV: ShortConvSpec(config.integer("conv_L_cache"), config.flag("conv_bias")),
    }
    chosen = router(
        config,
        renorm=config.flag("norm_topk_prob"),
        score="sigmoid",
        bias=config.flag("use_expert_bias"),
        renorm_eps=1e-6,
        scale=config.number("routed_scaling_factor"),
    )
    dense = MlpSpec(config.integer("intermediate_size"))
    moe = MoeSpec(chosen, MlpSpec(config.integer("moe_intermediate_size")))
    first_moe = config.integer("num_dense_layers", at_least=0)
    layers = [
        LayerSpec(mixers[kind], dense if number < first_moe else moe)
        for number, kind in enumerate(kinds)
    ]
    return llama(config, layers)
