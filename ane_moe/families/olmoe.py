"""OLMoE (OLMoE-1B-7B): q and k norms over the whole projected vector, expert weights not
renormalised."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import full_attention, gqa, llama, mlp, n_layers, router
from ane_moe.families.keys import MLP_EXPERTS, SKELETON, KeyTable
from ane_moe.families.taps import Taps
from ane_moe.model.spec import LayerSpec, ModelSpec, MoeSpec

KEYS: KeyTable = {
    **SKELETON,
    "layers.{layer}.ffn.router.weight": ("model.layers.{layer}.mlp.gate.weight",),
    **MLP_EXPERTS,
}
TAPS = Taps()


def spec(config: Config) -> ModelSpec:
    full_attention(config)
    bias = config.flag("attention_bias")
    clip = None if config.nullable("clip_qkv") is None else config.number("clip_qkv")
    attention = gqa(config, qk_norm="full", qkv_bias=bias, o_bias=bias, clip_qkv=clip)
    moe = MoeSpec(
        router(config, renorm=config.flag("norm_topk_prob")), mlp(config, "intermediate_size")
    )
    return llama(config, [LayerSpec(attention, moe)] * n_layers(config))
