"""dots.llm1: q and k norms per head, the router of DeepSeek-V3, shared experts, dense first layers,
windows where the file asks for them."""

from collections.abc import Callable

from ane_moe.families.config import Config
from ane_moe.families.decoder import (
    FULL,
    SLIDING,
    gqa,
    layer_windows,
    leading_dense,
    llama,
    mlp,
    shared_expert,
    sigmoid_router,
)
from ane_moe.families.keys import DEEPSEEK_FFN, SKELETON, KeyTable
from ane_moe.families.taps import DEEPSEEK, Taps
from ane_moe.model.spec import LayerSpec, ModelSpec, MoeSpec

KEYS: KeyTable = {**SKELETON, **DEEPSEEK_FFN}
TAPS: Taps = DEEPSEEK


def spec(config: Config) -> ModelSpec:
    bias = config.flag("attention_bias")
    shared = shared_expert(config, "moe_intermediate_size", "n_shared_experts")
    moe = MoeSpec(sigmoid_router(config), mlp(config, "moe_intermediate_size"), shared)
    layers = [
        LayerSpec(gqa(config, qk_norm="head", qkv_bias=bias, o_bias=bias, window=window), ffn)
        for window, ffn in zip(
            layer_windows(config, _above(config)), leading_dense(config, moe), strict=True
        )
    ]
    return llama(config, layers)


def _above(config: Config) -> Callable[[int], str]:
    """Without `layer_types`, layers from `max_window_layers` on have a window (Dots1Config)."""
    if not config.has("sliding_window"):
        return lambda number: FULL
    first = config.integer("max_window_layers", at_least=0)
    return lambda number: SLIDING if number >= first else FULL
