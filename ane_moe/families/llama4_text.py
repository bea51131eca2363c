"""Llama 4's language model alone: attention in chunks with rotation and whole without, which grows
sharper with the length of a text; gates on what enters an expert, a shared expert."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import (
    FULL,
    ROPE,
    gqa,
    layer_kinds,
    llama,
    mlp,
    n_layers,
    router,
)
from ane_moe.families.keys import (
    LAYER,
    SKELETON,
    KeyTable,
    expert_keys,
    fused_experts,
    mlp_keys,
    paired_queries,
)
from ane_moe.families.taps import Taps
from ane_moe.model.spec import GqaSpec, LayerSpec, ModelSpec, MoeSpec, SharedSpec, Temperature

CHUNKED = "chunked_attention"
NO_ROPE_INTERVAL = 4  # which transformers' code has built in for files that say nothing
KEYS: KeyTable = {
    **SKELETON,
    **paired_queries(),
    **mlp_keys("ffn.mlp", "feed_forward"),
    "layers.{layer}.ffn.router.weight": (f"{LAYER}.feed_forward.router.weight",),
    **expert_keys(
        fused_experts(
            "feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj", transposed=True
        )
    ),
    **mlp_keys("ffn.shared", "feed_forward.shared_expert"),
}
TAPS = Taps(score="sigmoid", by_logits=True, logits=1, sorted_inputs=True)


def spec(config: Config) -> ModelSpec:
    turning = _turning_layers(config)
    kinds = layer_kinds(
        config, known=(FULL, CHUNKED), otherwise=lambda number: CHUNKED if turning[number] else FULL
    )
    expert = mlp(config, "intermediate_size", gate_enters=True)
    moe = MoeSpec(
        router(config, renorm=False, score="sigmoid", by_logits=True),
        expert,
        SharedSpec(mlp(config, "intermediate_size")),
    )
    sparse = _moe_layers(config)
    layers = [
        LayerSpec(
            _attention(config, kind, turns),
            moe if number in sparse else mlp(config, "intermediate_size_mlp"),
        )
        for number, (kind, turns) in enumerate(zip(kinds, turning, strict=True))
    ]
    return llama(config, layers)


def _turning_layers(config: Config) -> tuple[bool, ...]:
    """Which layers rotate: what the field `no_rope_layers` has a 1 for."""
    count, given = n_layers(config), config.integers("no_rope_layers")
    if not given:
        name = "no_rope_layer_interval"
        interval = config.integer(name) if config.has(name) else NO_ROPE_INTERVAL
        return tuple((number + 1) % interval != 0 for number in range(count))
    if len(given) < count or set(given) - {0, 1}:
        raise config.wrong("no_rope_layers", f"{count} of 0 or 1")
    return tuple(map(bool, given[:count]))


def _moe_layers(config: Config) -> tuple[int, ...]:
    count, given = n_layers(config), config.integers("moe_layers")
    step = 1 if given else config.integer("interleave_moe_layer_step")
    return given or tuple(range(step - 1, count, step))


def _attention(config: Config, kind: str, turns: bool) -> GqaSpec:
    bias, tuned = config.flag("attention_bias"), bool(config.nullable("attn_temperature_tuning"))
    temperature = None
    if tuned and not turns:
        temperature = Temperature(config.integer("floor_scale"), config.number("attn_scale"))
    return gqa(
        config,
        rope=ROPE if turns else None,
        qk_norm="unit" if turns and config.flag("use_qk_norm") else "none",
        qkv_bias=bias,
        o_bias=bias,
        chunk=config.integer("attention_chunk_size") if kind == CHUNKED else None,
        temperature=temperature,
    )
