"""OpenAI's privacy filter: an encoder that labels tokens. Attention in a band around each token,
with sinks; experts with biases and a clamped activation, softmax over the chosen logits."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import clamp, gqa_facts, llama, n_layers, router
from ane_moe.families.keys import (
    LAYER,
    SKELETON,
    KeyTable,
    expert_keys,
    fused_experts,
    paired_queries,
)
from ane_moe.families.taps import Taps
from ane_moe.model.spec import BandSpec, HeadSpec, LayerSpec, MlpSpec, ModelSpec, MoeSpec

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"

KEYS: KeyTable = {
    **SKELETON,
    "head.rows.weight": ("score.weight",),
    "head.rows.bias": ("score.bias",),
    **paired_queries(),
    "layers.{layer}.attn.sinks.weight": (f"{LAYER}.self_attn.sinks",),
    "layers.{layer}.ffn.router.weight": (f"{LAYER}.mlp.router.weight",),
    "layers.{layer}.ffn.router.bias": (f"{LAYER}.mlp.router.bias",),
    **expert_keys(fused_experts(GATE_UP, DOWN, transposed=True)),
    **expert_keys(fused_experts(f"{GATE_UP}_bias", f"{DOWN}_bias"), kind="bias"),
}
TAPS = Taps(head="score")


def spec(config: Config) -> ModelSpec:
    bias = config.flag("attention_bias")
    attention = BandSpec(
        **gqa_facts(config, qkv_bias=bias, o_bias=bias, sinks=True),
        reach=config.integer("sliding_window"),
    )
    expert = MlpSpec(config.integer("intermediate_size"), clamp(config), bias=True)
    moe = MoeSpec(router(config, renorm=True, logit_bias=True), expert)
    head = HeadSpec(config.flag("tie_word_embeddings"), labels=_labels(config), bias=True)
    return llama(config, [LayerSpec(attention, moe)] * n_layers(config), head=head)


def _labels(config: Config) -> tuple[str, ...]:
    """Names in the order of their numbers."""
    given = config.nullable("id2label")
    numbers = [str(number) for number in range(len(given))] if isinstance(given, dict) else []
    by_number = {str(number): name for number, name in given.items()} if numbers else {}
    names = [by_number.get(number) for number in numbers]
    if not names or not all(isinstance(name, str) for name in names):
        raise config.wrong("id2label", "a name for each number from 0 on")
    return tuple(str(name) for name in names)
