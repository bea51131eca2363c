"""OpenAI's privacy filter: an encoder that labels tokens. Attention in a band around each token,
with sinks; experts with biases and a clamped activation, softmax over the chosen logits."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import gqa_facts, llama, n_layers, router
from ane_moe.families.keys import (
    LAYER,
    SKELETON,
    KeyTable,
    Paired,
    expert_keys,
    fused_experts,
)
from ane_moe.families.taps import Taps
from ane_moe.model.spec import BandSpec, Clamp, HeadSpec, LayerSpec, MlpSpec, ModelSpec, MoeSpec

# What transformers' code had built in before config.json came to say it.
ALPHA, LIMIT = 1.702, 7.0
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"

KEYS: KeyTable = {
    **SKELETON,
    "head.rows.weight": ("score.weight",),
    "head.rows.bias": ("score.bias",),
    **{
        f"layers.{{layer}}.attn.{name}.{kind}": (Paired(f"{LAYER}.self_attn.{name}_proj.{kind}"),)
        for name in "qk"
        for kind in ("weight", "bias")
    },
    "layers.{layer}.attn.sinks.weight": (f"{LAYER}.self_attn.sinks",),
    "layers.{layer}.ffn.router.weight": (f"{LAYER}.mlp.router.weight",),
    "layers.{layer}.ffn.router.bias": (f"{LAYER}.mlp.router.bias",),
    **expert_keys(fused_experts(GATE_UP, DOWN, transposed=True)),
    **expert_keys(fused_experts(f"{GATE_UP}_bias", f"{DOWN}_bias"), kind="bias"),
}
TAPS = Taps(head="score", experts_scale="num_experts")


def spec(config: Config) -> ModelSpec:
    bias = config.flag("attention_bias")
    attention = BandSpec(
        **gqa_facts(config, qkv_bias=bias, o_bias=bias, sinks=True),
        reach=config.integer("sliding_window"),
    )
    limit = _built_in(config, "swiglu_limit", LIMIT)
    clamp = Clamp(limit, _built_in(config, "swiglu_alpha", ALPHA))
    expert = MlpSpec(config.integer("intermediate_size"), clamp, bias=True)
    moe = MoeSpec(router(config, renorm=True, logit_bias=True), expert)
    head = HeadSpec(config.flag("tie_word_embeddings"), labels=_labels(config), bias=True)
    return llama(config, [LayerSpec(attention, moe)] * n_layers(config), head=head)


def _built_in(config: Config, name: str, value: float) -> float:
    return config.number(name) if config.has(name) else value


def _labels(config: Config) -> tuple[str, ...]:
    """Names in the order of their numbers."""
    given = config.nullable("id2label")
    numbers = [str(number) for number in range(len(given))] if isinstance(given, dict) else []
    by_number = {str(number): name for number, name in given.items()} if numbers else {}
    names = [by_number.get(number) for number in numbers]
    if not names or not all(isinstance(name, str) for name in names):
        raise config.wrong("id2label", "a name for each number from 0 on")
    return tuple(str(name) for name in names)
