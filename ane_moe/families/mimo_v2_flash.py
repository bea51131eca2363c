"""MiMo-V2-Flash: windows with sinks and twice the keys, values of another width than keys, a part
of each head rotated, sigmoid scores with a bias for the choice."""

from typing import Any

from ane_moe.families.config import Config
from ane_moe.families.decoder import (
    FULL,
    SLIDING,
    decoder,
    gqa,
    layer_kinds,
    listed_dense,
    mlp,
    sigmoid_router,
)
from ane_moe.families.keys import DEEPSEEK_FFN, LAYER, SKELETON, KeyTable
from ane_moe.families.rope import rope_config, rope_spec
from ane_moe.families.taps import DEEPSEEK, Taps
from ane_moe.model.spec import LayerSpec, ModelSpec, MoeSpec, RopeSpec

# What released files say: what transformers' class calls it.
FIELDS = {"layernorm_epsilon": "rms_norm_eps"}
LISTS = {
    "layer_types": ("hybrid_layer_pattern", (FULL, SLIDING)),
    "mlp_layer_types": ("moe_layer_freq", ("dense", "sparse")),
}
KEYS: KeyTable = {
    **SKELETON,
    **{ours: entries for ours, entries in DEEPSEEK_FFN.items() if ".shared." not in ours},
    "layers.{layer}.attn.sinks.weight": (
        f"{LAYER}.self_attn.attention_sink_bias",
        f"{LAYER}.self_attn.sinks",
    ),
}
TAPS: Taps = DEEPSEEK


def spec(config: Config) -> ModelSpec:
    config = _named(config)
    moe = MoeSpec(sigmoid_router(config), mlp(config, "moe_intermediate_size"))
    kinds = layer_kinds(config)
    common = {"value_dim": config.integer("v_head_dim"), "qkv_bias": config.flag("attention_bias")}
    attention = gqa(config, rope=FULL, **common)
    mixers = {FULL: attention}
    if SLIDING in kinds:
        keys = 2 * attention.kv_heads
        if attention.heads % keys:
            raise config.wrong("num_key_value_heads", "a divisor of half of the heads")
        window = {"window": config.integer("sliding_window"), "sinks": True}
        mixers[SLIDING] = gqa(config, rope=SLIDING, kv_heads=keys, **window, **common)
    scale = config.number("attention_value_scale") if config.has("attention_value_scale") else 1.0
    layers = [
        LayerSpec(mixers[kind], ffn, adds=(scale, 1.0))  # the output has no bias
        for kind, ffn in zip(kinds, listed_dense(config, moe), strict=True)
    ]
    ropes = {kind: _rope(config, kind, attention.head_dim) for kind in dict.fromkeys(kinds)}
    return decoder(config, layers, ropes=ropes)


def _rope(config: Config, kind: str, head_dim: int) -> RopeSpec:
    """The table of a kind of layer: of as many whole channels as the factor makes."""
    tables = config.values.get("rope_parameters")
    table = tables.get(kind) if isinstance(tables, dict) else None
    if not isinstance(table, dict):
        raise config.wrong("rope_parameters", f"an object for each kind of layer, {kind} too")
    rope = rope_config(Config({"rope_parameters": table}, config.where))
    rotated = int(head_dim * rope.number("partial_rotary_factor"))
    if not 0 < rotated <= head_dim:
        raise rope.wrong("partial_rotary_factor", "more than 0, and at most 1")
    return rope_spec(rope, rotated)


def _named(config: Config) -> Config:
    """With the fields of released files under transformers' names: numbers in place of kinds,
    tokens before a window's own, a base beside the other one, and null for a factor of 1."""
    values: dict[str, Any] = dict(config.renamed(FIELDS, attention_bias=False).values)
    for ours, (theirs, kinds) in LISTS.items():
        numbers = config.integers(theirs)
        if numbers and not values.get(ours):
            if set(numbers) - {0, 1}:
                raise config.wrong(theirs, "a list of 0 and 1")
            values[ours] = [kinds[number] for number in numbers]
    if config.has("sliding_window_size"):
        values["sliding_window"] = config.integer("sliding_window_size") + 1
    if values.get("routed_scaling_factor") is None:
        values["routed_scaling_factor"] = 1.0
    if not values.get("rope_parameters") and config.has("swa_rope_theta"):
        names = {FULL: "rope_theta", SLIDING: "swa_rope_theta"}
        shared = {"partial_rotary_factor": config.number("partial_rotary_factor")}
        values["rope_parameters"] = {
            kind: shared | {"rope_theta": config.number(name)} for kind, name in names.items()
        }
    return Config(values, config.where)
