"""FlexOlmo (FlexOlmo-7x7B): norms after attention and experts in place of before, q and k norms of
the whole projected vector."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import full_attention, gqa, llama, mlp, n_layers, router
from ane_moe.families.keys import LAYER, MLP_EXPERTS, SKELETON, KeyTable
from ane_moe.families.taps import Taps
from ane_moe.model.spec import LayerSpec, ModelSpec, MoeSpec

BEFORE = ("layers.{layer}.attn.norm.weight", "layers.{layer}.ffn.norm.weight")
KEYS: KeyTable = {
    **{ours: entries for ours, entries in SKELETON.items() if ours not in BEFORE},
    "layers.{layer}.attn.residual.after.weight": (f"{LAYER}.post_attention_layernorm.weight",),
    "layers.{layer}.ffn.residual.after.weight": (f"{LAYER}.post_feedforward_layernorm.weight",),
    "layers.{layer}.ffn.router.weight": (f"{LAYER}.mlp.gate.weight",),
    **MLP_EXPERTS,
}
TAPS = Taps(ffn_norm="mlp", after="post_feedforward_layernorm")


def spec(config: Config) -> ModelSpec:
    full_attention(config)
    bias = config.flag("attention_bias")
    attention = gqa(config, qk_norm="full", qkv_bias=bias, o_bias=bias)
    moe = MoeSpec(
        router(config, renorm=config.flag("norm_topk_prob")), mlp(config, "intermediate_size")
    )
    return llama(config, [LayerSpec(attention, moe, norms="after")] * n_layers(config))
