"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-Coder-30B-A3B): q and k norms per head, dense layers where the
config says so."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import gqa, llama, mlp, router
from ane_moe.families.keys import MLP_EXPERTS, SKELETON, KeyTable, mlp_keys
from ane_moe.families.qwen2_moe import moe_layers
from ane_moe.families.taps import Taps
from ane_moe.model.spec import LayerSpec, ModelSpec, MoeSpec

KEYS: KeyTable = {
    **SKELETON,
    **mlp_keys("ffn.mlp", "mlp"),
    "layers.{layer}.ffn.router.weight": ("model.layers.{layer}.mlp.gate.weight",),
    **MLP_EXPERTS,
}
TAPS = Taps()


def spec(config: Config) -> ModelSpec:
    bias = config.flag("attention_bias")
    # One window for all layers: transformers 5 reads neither `max_window_layers` nor `layer_types`
    # here.
    window = config.integer("sliding_window") if config.flag("use_sliding_window") else None
    attention = gqa(config, qk_norm="head", qkv_bias=bias, o_bias=bias, window=window)
    moe = MoeSpec(
        router(config, renorm=config.flag("norm_topk_prob")), mlp(config, "moe_intermediate_size")
    )
    ffns = [moe if sparse else mlp(config, "intermediate_size") for sparse in moe_layers(config)]
    return llama(config, [LayerSpec(attention, ffn) for ffn in ffns])
