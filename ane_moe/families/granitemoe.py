"""Granite MoE (granite-3.1-1b-a400m, 3b-a800m): four multipliers, softmax over the chosen logits,
fused experts."""

from collections.abc import Iterable
from typing import Any

from ane_moe.families.config import Config
from ane_moe.families.decoder import full_attention, gqa, llama, mlp, n_layers, router
from ane_moe.families.keys import SKELETON, KeyTable, expert_keys, fused_experts
from ane_moe.families.taps import Taps
from ane_moe.model.spec import (
    GqaSpec,
    LayerSpec,
    MixerSpec,
    ModelSpec,
    MoeSpec,
    SharedSpec,
)

KEYS: KeyTable = {
    **SKELETON,
    "layers.{layer}.ffn.router.weight": (
        "model.layers.{layer}.block_sparse_moe.router.layer.weight",
        "model.layers.{layer}.block_sparse_moe.router.weight",
    ),
    **expert_keys(
        fused_experts(
            "block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"
        ),
        fused_experts(
            "block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"
        ),
    ),
}
TAPS = Taps()


def spec(config: Config) -> ModelSpec:
    full_attention(config)
    return llama(config, layers(config, [attention(config)] * n_layers(config)), **scales(config))


def attention(config: Config, **facts: Any) -> GqaSpec:
    """The attention of all Granite families."""
    bias, scale = config.flag("attention_bias"), config.number("attention_multiplier")
    return gqa(config, scale=scale, qkv_bias=bias, o_bias=bias, **facts)


def layers(
    config: Config, mixers: Iterable[MixerSpec], shared: SharedSpec | None = None
) -> list[LayerSpec]:
    """Layers of these mixers, and experts."""
    moe = MoeSpec(router(config, renorm=True), mlp(config, "intermediate_size"), shared)
    return [LayerSpec(mixer, moe) for mixer in mixers]


def scales(config: Config) -> dict[str, Any]:
    """The multipliers of all Granite families."""
    return {
        "embed_scale": config.number("embedding_multiplier"),
        "residual_scale": config.number("residual_multiplier"),
        "logit_scale": 1 / config.number("logits_scaling"),
    }
