"""Flint: sinks, windows with rotation and full layers without, sigmoid scores, a shared expert."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import ROPE, gqa, layer_windows, llama, mlp, router
from ane_moe.families.keys import LAYER, KeyTable
from ane_moe.families.qwen2_moe import KEYS as QWEN2_MOE
from ane_moe.families.qwen2_moe import moe_layers
from ane_moe.families.taps import Taps
from ane_moe.model.spec import LayerSpec, ModelSpec, MoeSpec, SharedSpec

KEYS: KeyTable = {
    **{ours: entries for ours, entries in QWEN2_MOE.items() if "shared_gate" not in ours},
    "layers.{layer}.attn.sinks.weight": (
        f"{LAYER}.self_attn.softmax_offset",
        f"{LAYER}.self_attn.sinks",
    ),
}
TAPS = Taps(score="sigmoid")


def spec(config: Config) -> ModelSpec:
    bias = config.flag("attention_bias")
    mixers = [
        gqa(
            config,
            qk_norm="head",
            qkv_bias=bias,
            o_bias=bias,
            sinks=True,
            window=window,
            rope=ROPE if window else None,
        )
        for window in layer_windows(config)
    ]
    chosen = router(config, renorm=config.flag("norm_topk_prob"), score="sigmoid")
    shared = SharedSpec(mlp(config, "shared_expert_intermediate_size"))
    moe = MoeSpec(chosen, mlp(config, "moe_intermediate_size"), shared)
    ffns = [moe if sparse else mlp(config, "intermediate_size") for sparse in moe_layers(config)]
    return llama(config, [LayerSpec(mixer, ffn) for mixer, ffn in zip(mixers, ffns, strict=True)])
