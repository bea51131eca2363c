"""Mixtral (Mixtral-8x7B, 8x22B): the plain Llama skeleton, few and wide experts."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import gqa, llama, mlp, n_layers, router
from ane_moe.families.keys import SKELETON, KeyTable, each_expert, expert_keys, fused_experts
from ane_moe.families.taps import Taps
from ane_moe.model.spec import LayerSpec, ModelSpec, MoeSpec

# transformers reads `block_sparse_moe` and its own newer `mlp` alike.
KEYS: KeyTable = {
    **SKELETON,
    "layers.{layer}.ffn.router.weight": (
        "model.layers.{layer}.block_sparse_moe.gate.weight",
        "model.layers.{layer}.mlp.gate.weight",
    ),
    **expert_keys(
        each_expert("block_sparse_moe.experts", gate="w1", up="w3", down="w2"),
        each_expert("mlp.experts", gate="w1", up="w3", down="w2"),
        fused_experts(
            "block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"
        ),
        fused_experts("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    ),
}
TAPS = Taps()


def spec(config: Config) -> ModelSpec:
    window = None if config.nullable("sliding_window") is None else config.integer("sliding_window")
    moe = MoeSpec(router(config, renorm=True), mlp(config, "intermediate_size"))
    return llama(config, [LayerSpec(gqa(config, window=window), moe)] * n_layers(config))
