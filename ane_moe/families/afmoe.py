"""AFMoE (Trinity-Mini): norms before and after attention and experts, gated attention, windows with
rotation and full layers without, sigmoid scores with a bias for the choice, a shared expert."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import (
    ROPE,
    gqa,
    layer_windows,
    leading_dense,
    llama,
    mlp,
    router,
    shared_expert,
)
from ane_moe.families.keys import DEEPSEEK_FFN, LAYER, SKELETON, KeyTable
from ane_moe.families.taps import Taps
from ane_moe.model.spec import LayerSpec, ModelSpec, MoeSpec

KEYS: KeyTable = {
    **SKELETON,
    **DEEPSEEK_FFN,
    "layers.{layer}.attn.gate.weight": (f"{LAYER}.self_attn.gate_proj.weight",),
    "layers.{layer}.attn.residual.after.weight": (f"{LAYER}.post_attention_layernorm.weight",),
    "layers.{layer}.ffn.norm.weight": (f"{LAYER}.pre_mlp_layernorm.weight",),
    "layers.{layer}.ffn.residual.after.weight": (f"{LAYER}.post_mlp_layernorm.weight",),
    "layers.{layer}.ffn.router.weight": (f"{LAYER}.mlp.router.gate.weight",),
    "layers.{layer}.ffn.router.choice_bias": (f"{LAYER}.mlp.expert_bias",),
}
TAPS = Taps(
    ffn_norm="pre_mlp_layernorm",
    after="post_mlp_layernorm",
    score="sigmoid",
    choice_bias="expert_bias",
)


def spec(config: Config) -> ModelSpec:
    mixers = [
        gqa(
            config,
            qk_norm="head",
            gate="sigmoid",
            window=window,
            rope=ROPE if window else None,
        )
        for window in layer_windows(config)
    ]
    scale = config.number("route_scale")
    chosen = router(config, renorm=True, score="sigmoid", bias=True, scale=scale)
    shared = shared_expert(config, "moe_intermediate_size", "num_shared_experts")
    moe = MoeSpec(chosen, mlp(config, "moe_intermediate_size"), shared)
    ffns = leading_dense(config, moe, "num_dense_layers")
    layers = [
        LayerSpec(mixer, ffn, norms="around") for mixer, ffn in zip(mixers, ffns, strict=True)
    ]
    root = config.integer("hidden_size") ** 0.5
    return llama(config, layers, embed_scale=root if config.flag("mup_enabled") else 1.0)
