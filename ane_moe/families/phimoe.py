"""Phi-MoE (Phi-3.5-MoE, Phi-mini-MoE, Phi-tiny-MoE): LayerNorms, the sparse mixer, a head with a
bias."""

import numpy as np

from ane_moe.families.config import MAX_EXPERTS, Config
from ane_moe.families.decoder import EPS, ROPE, decoder, gqa, mlp, n_layers, rope_table
from ane_moe.families.keys import LAYER, KeyTable, norm_biases
from ane_moe.families.mixtral import KEYS as MIXTRAL
from ane_moe.families.rope import rope_config
from ane_moe.families.taps import Taps
from ane_moe.model.sparse_mixer import SparseMixerSpec
from ane_moe.model.spec import HeadSpec, LayerSpec, ModelSpec, MoeSpec, NormSpec, RopeSpec

KEYS: KeyTable = {
    **MIXTRAL,
    **norm_biases(MIXTRAL),
    "layers.{layer}.ffn.router.weight": (
        f"{LAYER}.block_sparse_moe.gate.weight",
        f"{LAYER}.mlp.router.weight",
    ),
}
TAPS = Taps()


def spec(config: Config) -> ModelSpec:
    bias = config.flag("attention_bias")
    config.only("num_experts_per_tok", 2)
    window = None if config.nullable("sliding_window") is None else config.integer("sliding_window")
    attention = gqa(config, qkv_bias=bias, o_bias=bias, window=window)
    experts = config.integer("num_experts", "num_local_experts", at_least=2, at_most=MAX_EXPERTS)
    chosen = SparseMixerSpec(experts, config.number("router_jitter_noise"))
    layer = LayerSpec(attention, MoeSpec(chosen, mlp(config, "intermediate_size")))
    rope, limit = _rope(config, attention.head_dim)
    return decoder(
        config,
        [layer] * n_layers(config),
        ropes={ROPE: rope},
        context=limit,
        norm=NormSpec(config.number(*EPS), "layer", bias=True),
        head=HeadSpec(config.flag("tie_word_embeddings"), bias=config.flag("lm_head_bias")),
    )


def _rope(config: Config, head_dim: int) -> tuple[RopeSpec, int]:
    """The table, and the context it is right for: beyond the original one longrope has another, for
    all tokens of a text that is so long."""
    rope, whole = rope_config(config), config.integer("max_position_embeddings")
    rope.only("partial_rotary_factor", None, 1)
    if rope.values["rope_type"] != "longrope":
        rope.only("rope_type", "default", "longrope")
        return rope_table(rope, head_dim), whole
    plain = rope_table(Config(rope.values | {"rope_type": "default"}, rope.where), head_dim)
    shorter = rope.values.get("short_factor")
    factors = shorter if isinstance(shorter, list) else []
    sound = all(isinstance(one, int | float) and one > 0 for one in factors)
    if len(factors) != len(plain.inv_freq) or not sound:
        raise rope.wrong("short_factor", f"{len(plain.inv_freq)} positive numbers")
    scaled = np.asarray(plain.inv_freq, np.float32) / np.asarray(factors, np.float32)
    limit = min(whole, rope.integer("original_max_position_embeddings"))
    return RopeSpec(tuple(map(float, scaled)), rope.number("short_mscale")), limit
