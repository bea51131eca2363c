"""K-EXAONE (K-EXAONE-236B-A23B): windows with rotation, full layers without, the router of
DeepSeek-V3, shared experts."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import (
    ROPE,
    gqa,
    layer_windows,
    listed_dense,
    llama,
    mlp,
    shared_expert,
    sigmoid_router,
)
from ane_moe.families.keys import DEEPSEEK_FFN, LAYER, SKELETON, KeyTable
from ane_moe.families.taps import DEEPSEEK, Taps
from ane_moe.model.spec import LayerSpec, ModelSpec, MoeSpec

KEYS: KeyTable = {
    **SKELETON,
    **DEEPSEEK_FFN,
    "layers.{layer}.ffn.router.choice_bias": (
        f"{LAYER}.mlp.e_score_correction_bias",
        f"{LAYER}.mlp.gate.e_score_correction_bias",
    ),
}
TAPS: Taps = DEEPSEEK


def spec(config: Config) -> ModelSpec:
    mixers = [
        gqa(config, qk_norm="head", window=window, rope=ROPE if window else None)
        for window in layer_windows(config)
    ]
    shared = shared_expert(config, "moe_intermediate_size", "num_shared_experts")
    moe = MoeSpec(sigmoid_router(config), mlp(config, "moe_intermediate_size"), shared)
    ffns = listed_dense(config, moe)
    return llama(config, [LayerSpec(mixer, ffn) for mixer, ffn in zip(mixers, ffns, strict=True)])
