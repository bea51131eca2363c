"""Aria, its language model: softmax over the chosen logits, shared experts, and experts stored with
what enters them first."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import gqa, llama, mlp, n_layers, router, shared_expert, text_config
from ane_moe.families.keys import (
    LAYER,
    SKELETON,
    KeyTable,
    expert_keys,
    fused_experts,
    mlp_keys,
)
from ane_moe.families.taps import Taps
from ane_moe.model.spec import LayerSpec, ModelSpec, MoeSpec

KEYS: KeyTable = {
    **SKELETON,
    "layers.{layer}.ffn.router.weight": (f"{LAYER}.mlp.router.weight",),
    **expert_keys(
        fused_experts("mlp.experts.fc1.weight", "mlp.experts.fc2.weight", transposed=True),
        fused_experts("mlp.experts.gate_up_proj", "mlp.experts.down_proj", transposed=True),
    ),
    **mlp_keys("ffn.shared", "mlp.shared_experts"),
}
TAPS = Taps()


def spec(config: Config) -> ModelSpec:
    config = text_config(config)
    config.only("mlp_bias", None, False)
    bias = config.flag("attention_bias")
    attention = gqa(config, qkv_bias=bias, o_bias=bias)
    shared = shared_expert(config, "intermediate_size", "moe_num_shared_experts")
    moe = MoeSpec(router(config, renorm=True), mlp(config, "intermediate_size"), shared)
    return llama(config, [LayerSpec(attention, moe)] * n_layers(config))
