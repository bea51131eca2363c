"""Qwen2-MoE (Qwen1.5-MoE-A2.7B): biases on q, k and v, an always-on expert behind a sigmoid
gate."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import gqa, llama, mlp, n_layers, router
from ane_moe.families.keys import MLP_EXPERTS, SKELETON, KeyTable, mlp_keys
from ane_moe.families.taps import Taps
from ane_moe.model.spec import LayerSpec, ModelSpec, MoeSpec, SharedSpec

KEYS: KeyTable = {
    **SKELETON,
    **mlp_keys("ffn.mlp", "mlp"),
    "layers.{layer}.ffn.router.weight": ("model.layers.{layer}.mlp.gate.weight",),
    **MLP_EXPERTS,
    **mlp_keys("ffn.shared", "mlp.shared_expert"),
    "layers.{layer}.ffn.shared_gate.weight": (
        "model.layers.{layer}.mlp.shared_expert_gate.weight",
    ),
}
TAPS = Taps()


def spec(config: Config) -> ModelSpec:
    # Qwen1.5-MoE's files are older than the field, when the code had the biases built in; the keys
    # prove either.
    bias = config.flag("qkv_bias") if config.has("qkv_bias") else True
    shared = SharedSpec(mlp(config, "shared_expert_intermediate_size"), gated=True)
    moe = MoeSpec(
        router(config, config.flag("norm_topk_prob")), mlp(config, "moe_intermediate_size"), shared
    )
    ffns = [moe if sparse else mlp(config, "intermediate_size") for sparse in moe_layers(config)]
    mixers = [gqa(config, qkv_bias=bias, window=window) for window in _windows(config)]
    return llama(config, [LayerSpec(mixer, ffn) for mixer, ffn in zip(mixers, ffns, strict=True)])


def moe_layers(config: Config) -> list[bool]:
    """Which layers are MoE: every `decoder_sparse_step`-th but those of `mlp_only_layers` (also
    Qwen3-MoE's rule)."""
    step, dense = config.integer("decoder_sparse_step"), config.integers("mlp_only_layers")
    return [number not in dense and (number + 1) % step == 0 for number in range(n_layers(config))]


def _windows(config: Config) -> list[int | None]:
    """Each layer's window; without `layer_types`, every other layer below `max_window_layers`
    (Qwen2MoeConfig)."""
    count, sliding = n_layers(config), config.flag("use_sliding_window")
    kinds = config.strings("layer_types")
    if not kinds and sliding:
        below = config.integer("max_window_layers")
        kinds = tuple(
            "sliding_attention" if n % 2 == 0 and n < below else "full_attention"
            for n in range(count)
        )
    kinds = kinds or ("full_attention",) * count
    known = {"full_attention"} | ({"sliding_attention"} if sliding else set())
    if len(kinds) < count or set(kinds) - known:
        raise config.wrong("layer_types", f"{count} of {' or '.join(sorted(known))}")
    return [
        config.integer("sliding_window") if kind == "sliding_attention" else None
        for kind in kinds[:count]
    ]
