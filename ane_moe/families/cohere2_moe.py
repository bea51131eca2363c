"""Cohere's MoE (Command A+): attention and experts that read one norm of a layer's input, and add
to that; windows with rotation of neighbouring channels, full layers without."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import (
    ROPE,
    gqa,
    layer_kinds,
    layer_windows,
    llama,
    mlp,
    router,
    shared_expert,
)
from ane_moe.families.keys import DEEPSEEK_FFN, LAYER, SKELETON, KeyTable, paired_queries
from ane_moe.families.taps import Taps
from ane_moe.model.spec import LayerSpec, ModelSpec, MoeSpec, NormSpec

KEYS: KeyTable = {
    **SKELETON,
    **DEEPSEEK_FFN,
    **paired_queries(),
    "layers.{layer}.ffn.norm.weight": (f"{LAYER}.input_layernorm.weight",),
}
TAPS = Taps(ffn_norm="input_layernorm", beside="self_attn")


def spec(config: Config) -> ModelSpec:
    by_mean = not config.has("rms_norm_eps")
    eps = config.number("layer_norm_eps" if by_mean else "rms_norm_eps")
    config = Config(config.values | {"rms_norm_eps": eps}, config.where)
    return llama(
        config,
        _layers(config),
        config.number("logit_scale"),
        norm=NormSpec(eps, "layer" if by_mean else "rms"),
        shared_scale=_share(config),
    )


def _layers(config: Config) -> list[LayerSpec]:
    """Full layers are not rotated, but for dense ones where those have no windows by pattern."""
    bias, experts = config.flag("attention_bias"), _experts(config)
    dense = mlp(config, _dense_width(config))
    kinds = layer_kinds(config, "mlp_layer_types", ("dense", "sparse"))
    rotated = {"dense"} if config.integer("prefix_dense_sliding_window_pattern") == 1 else set()
    layers = []
    for kind, window in zip(kinds, layer_windows(config), strict=True):
        rope = ROPE if window or kind in rotated else None
        attention = gqa(config, qkv_bias=bias, o_bias=bias, window=window, rope=rope)
        ffn = experts if kind == "sparse" else dense
        layers.append(LayerSpec(attention, ffn, parallel=True))
    return layers


def _dense_width(config: Config) -> str:
    prefix = "prefix_dense_intermediate_size"
    return prefix if config.has(prefix) else "intermediate_size"


def _experts(config: Config) -> MoeSpec:
    """Of the k largest logits a softmax, or the sigmoid of each."""
    config.only("expert_selection_fn", "softmax", "sigmoid")
    score = config.values["expert_selection_fn"]
    renorm = score == "softmax" or config.flag("norm_topk_prob")
    chosen = router(config, renorm, score=score, scale=_share(config))
    shared = shared_expert(config, "intermediate_size", "num_shared_experts")
    return MoeSpec(chosen, mlp(config, "intermediate_size"), shared)


def _share(config: Config) -> float:
    """What experts give is added up, or averaged with what shared experts do."""
    config.only("shared_expert_combination_strategy", "sum", "average")
    average = config.values["shared_expert_combination_strategy"] == "average"
    return 0.5 if average and config.integer("num_shared_experts", at_least=0) else 1.0
