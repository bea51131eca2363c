"""Kolibri 1: norms before and after attention and experts, windows with rotation and full layers
without, experts chosen by logits with a bias and weighted by sigmoids, a shared expert."""

from dataclasses import replace

from ane_moe.families.config import Config
from ane_moe.families.decoder import FULL, ROPE, SLIDING, gqa, layer_windows, llama, mlp, router
from ane_moe.families.keys import DEEPSEEK_MOE, LAYER, SKELETON, KeyTable
from ane_moe.families.taps import Taps
from ane_moe.model.spec import LayerSpec, ModelSpec, MoeSpec, SharedSpec

KEYS: KeyTable = {
    **SKELETON,
    **DEEPSEEK_MOE,
    "layers.{layer}.attn.residual.after.weight": (
        f"{LAYER}.post_attn_norm.weight",
        f"{LAYER}.post_self_attn_layernorm.weight",
    ),
    "layers.{layer}.ffn.residual.after.weight": (
        f"{LAYER}.post_ffn_norm.weight",
        f"{LAYER}.post_mlp_layernorm.weight",
    ),
    "layers.{layer}.ffn.router.choice_bias": (
        f"{LAYER}.moe.router.expert_bias",
        f"{LAYER}.mlp.gate.e_score_correction_bias",
    ),
}
TAPS = Taps(
    score="sigmoid",
    choice_bias="e_score_correction_bias",
    by_logits=True,
    after="post_mlp_layernorm",
)


def spec(config: Config) -> ModelSpec:
    attention = gqa(config, qk_norm="head")
    rotated = not config.has("sliding_window")  # full layers have no rotation beside windows
    mixers = [
        replace(attention, window=window, rope=ROPE if window or rotated else None)
        for window in layer_windows(config, _every_fifth_is_full)
    ]
    chosen = router(
        config, renorm=config.flag("norm_topk_prob"), score="sigmoid", bias=True, by_logits=True
    )
    shared = SharedSpec(mlp(config, "shared_expert_intermediate_size"))
    moe = MoeSpec(chosen, mlp(config, "moe_intermediate_size"), shared)
    return llama(config, [LayerSpec(mixer, moe, norms="around") for mixer in mixers])


def _every_fifth_is_full(number: int) -> str:
    return SLIDING if (number + 1) % 5 else FULL
