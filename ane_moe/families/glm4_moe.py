"""GLM-4.5 (GLM-4.5, GLM-4.5-Air): half of each head rotated, the router of DeepSeek-V3, a shared
expert, dense first layers."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import gqa, leading_dense, llama, mlp, shared_expert, sigmoid_router
from ane_moe.families.keys import DEEPSEEK_FFN, SKELETON, KeyTable
from ane_moe.families.taps import DEEPSEEK, Taps
from ane_moe.model.spec import LayerSpec, ModelSpec, MoeSpec

KEYS: KeyTable = {**SKELETON, **DEEPSEEK_FFN}
TAPS: Taps = DEEPSEEK


def spec(config: Config) -> ModelSpec:
    norm = "head" if config.flag("use_qk_norm") else "none"
    attention = gqa(config, qkv_bias=config.flag("attention_bias"), qk_norm=norm)
    shared = shared_expert(config, "moe_intermediate_size", "n_shared_experts")
    moe = MoeSpec(sigmoid_router(config), mlp(config, "moe_intermediate_size"), shared)
    layers = [LayerSpec(attention, ffn) for ffn in leading_dense(config, moe)]
    return llama(config, layers, partial=True)
