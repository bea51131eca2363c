"""Qwen3-VL-MoE (Qwen3-VL-30B-A3B), its language model: Qwen3-MoE's layer. Without images all three
positions of a token are one, and rotation is the usual one."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import gqa, llama, mlp, router, text_config
from ane_moe.families.keys import KeyTable, expert_keys, fused_experts
from ane_moe.families.qwen2_moe import moe_layers
from ane_moe.families.qwen3_moe import KEYS as QWEN3_MOE
from ane_moe.families.taps import Taps
from ane_moe.model.spec import LayerSpec, ModelSpec, MoeSpec

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"

# The published files have matrices with what enters them first, those that transformers 5 saves
# have not; a square one would be taken as the latter, as transformers does.
KEYS: KeyTable = {
    **QWEN3_MOE,
    **expert_keys(fused_experts(GATE_UP, DOWN), fused_experts(GATE_UP, DOWN, transposed=True)),
}
TAPS = Taps()


def spec(config: Config) -> ModelSpec:
    config = text_config(config)
    bias = config.flag("attention_bias")
    attention = gqa(config, qk_norm="head", qkv_bias=bias, o_bias=bias)
    moe = MoeSpec(router(config, renorm=True), mlp(config, "moe_intermediate_size"))
    ffns = [moe if sparse else mlp(config, "intermediate_size") for sparse in moe_layers(config)]
    return llama(config, [LayerSpec(attention, ffn) for ffn in ffns])
