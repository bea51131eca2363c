"""Hy3 (Hy3-preview): q and k norms per head, sigmoid scores with a bias for the choice, shared
experts, dense layers where the file says so."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import gqa, listed_dense, llama, mlp, router, shared_expert
from ane_moe.families.keys import DEEPSEEK_FFN, LAYER, SKELETON, KeyTable
from ane_moe.families.taps import Taps
from ane_moe.model.spec import LayerSpec, ModelSpec, MoeSpec

KEYS: KeyTable = {
    **SKELETON,
    **DEEPSEEK_FFN,
    "layers.{layer}.ffn.router.weight": (
        f"{LAYER}.mlp.router.gate.weight",
        f"{LAYER}.mlp.gate.weight",
    ),
    "layers.{layer}.ffn.router.choice_bias": (
        f"{LAYER}.mlp.expert_bias",
        f"{LAYER}.mlp.e_score_correction_bias",
    ),
    **{
        f"layers.{{layer}}.ffn.shared.{name}.weight": (
            f"{LAYER}.mlp.shared_mlp.{name}_proj.weight",
            f"{LAYER}.mlp.shared_experts.{name}_proj.weight",
        )
        for name in ("gate", "up", "down")
    },
}
TAPS = Taps(score="sigmoid", choice_bias="e_score_correction_bias")


def spec(config: Config) -> ModelSpec:
    config.only("mlp_bias", None, False)
    bias, scale = config.flag("attention_bias"), config.number("router_scaling_factor")
    attention = gqa(config, qk_norm="head", qkv_bias=bias, o_bias=bias)
    chosen = router(config, renorm=True, score="sigmoid", bias=True, scale=scale)
    config.integer("num_shared_experts")  # transformers takes none for a dense layer's width
    shared = shared_expert(config, "moe_intermediate_size", "num_shared_experts")
    moe = MoeSpec(chosen, mlp(config, "moe_intermediate_size"), shared)
    return llama(config, [LayerSpec(attention, ffn) for ffn in listed_dense(config, moe)])
