"""Mistral 4 alone: DeepSeek-V3's layer with softmax scores, and no bias for the
choice."""

from dataclasses import replace

from ane_moe.families.config import Config
from ane_moe.families.decoder import leading_dense, sigmoid_router
from ane_moe.families.deepseek_v3 import KEYS as DEEPSEEK_V3
from ane_moe.families.deepseek_v3 import experts, latent_model
from ane_moe.families.keys import KeyTable, expert_keys, fused_experts
from ane_moe.families.rope import rope_config
from ane_moe.families.taps import Taps
from ane_moe.model.spec import ModelSpec

BIAS = "layers.{layer}.ffn.router.choice_bias"
KEYS: KeyTable = {
    **{ours: entries for ours, entries in DEEPSEEK_V3.items() if ours != BIAS},
    **expert_keys(fused_experts("mlp.experts.gate_up_proj", "mlp.experts.down_proj")),
}
TAPS = Taps(groups=("num_group", "topk_group"))


def spec(config: Config) -> ModelSpec:
    chosen = replace(sigmoid_router(config), score="softmax", bias=False)
    ffns = leading_dense(config, experts(config, chosen))
    interleaved = config.flag("rope_interleave")
    return latent_model(_as_deepseek(config), ffns, interleaved=interleaved)


def _as_deepseek(config: Config) -> Config:
    """The configuration with what DeepSeek-V3's leaves out: the share of rotated channels, and a
    factor of queries that is 1 for the tokens of YaRN's original context, which is the limit."""
    rope, rotated = rope_config(config), config.integer("qk_rope_head_dim")
    head = config.integer("qk_nope_head_dim") + rotated
    config.only("head_dim", None, head)
    rope.only("rope_type", "yarn")  # transformers' table of others has channels for all of a head
    rope.only("partial_rotary_factor", rotated / head)
    context = config.integer("max_position_embeddings")
    if rope.nullable("llama_4_scaling_beta"):
        context = min(context, rope.integer("original_max_position_embeddings"))
    plain = {"rope_parameters": rope.values | {"partial_rotary_factor": None}, "rope_scaling": None}
    return Config(config.values | plain | {"max_position_embeddings": context}, config.where)
