"""Solar Open (Solar-Open-100B): the router of DeepSeek-V3 and a shared expert in every layer."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import gqa, llama, mlp, n_layers, shared_expert, sigmoid_router
from ane_moe.families.keys import DEEPSEEK_MOE, SKELETON, KeyTable
from ane_moe.families.taps import DEEPSEEK, Taps
from ane_moe.model.spec import LayerSpec, ModelSpec, MoeSpec

KEYS: KeyTable = {**SKELETON, **DEEPSEEK_MOE}
TAPS: Taps = DEEPSEEK


def spec(config: Config) -> ModelSpec:
    attention = gqa(config, qkv_bias=config.flag("attention_bias"))
    shared = shared_expert(config, "moe_intermediate_size", "n_shared_experts")
    moe = MoeSpec(sigmoid_router(config), mlp(config, "moe_intermediate_size"), shared)
    return llama(config, [LayerSpec(attention, moe)] * n_layers(config))
