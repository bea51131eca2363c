"""Reads the config fields that the Llama-shaped families share."""

from collections.abc import Iterable
from typing import Any

from ane_moe.families.config import MAX_EXPERTS, MAX_LAYERS, Config
from ane_moe.families.rope import rope_config, rope_spec
from ane_moe.model.spec import (
    GqaSpec,
    HeadSpec,
    LayerSpec,
    MlpSpec,
    ModelSpec,
    NormSpec,
    RouterSpec,
)

EPS = ("rms_norm_eps", "norm_eps")
ROPE = "main"  # these families have one rotary table


def gqa(config: Config, **facts: Any) -> GqaSpec:
    """Attention from the usual fields; `facts` are the GqaSpec fields in which the family
    differs."""
    return GqaSpec(**gqa_facts(config, **facts))


def gqa_facts(config: Config, **facts: Any) -> dict[str, Any]:
    """The fields of `gqa`."""
    d_model, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads")
    if heads % kv_heads:
        raise config.wrong("num_key_value_heads", f"a divisor of num_attention_heads = {heads}")
    if config.has("head_dim"):
        head_dim = config.integer("head_dim")
    elif d_model % heads == 0:
        head_dim = d_model // heads
    else:
        raise config.missing("head_dim")
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    usual = {"scale": head_dim**-0.5, "rope": ROPE, "qk_norm_eps": config.number(*EPS)}
    return {**sizes, **usual, **facts}


def mlp(config: Config, width: str) -> MlpSpec:
    """A gated MLP whose inner width is the field `width`."""
    config.only("hidden_act", "silu", "swish")
    return MlpSpec(config.integer(width))


def router(config: Config, renorm: bool, **facts: Any) -> RouterSpec:
    """The router from the usual fields; `facts` are the RouterSpec fields in which the family
    differs."""
    experts = config.integer("num_experts", "num_local_experts", at_most=MAX_EXPERTS)
    k = config.integer("num_experts_per_tok")
    if k > experts:
        raise config.wrong("num_experts_per_tok", f"at most the number of experts, {experts}")
    return RouterSpec(experts, k, renorm, **facts)


def n_layers(config: Config) -> int:
    """The number of layers."""
    return config.integer("num_hidden_layers", at_most=MAX_LAYERS)


def full_attention(config: Config) -> None:
    """Refuse a configuration that asks for sliding windows, which the family's own code would
    ignore."""
    config.only("sliding_window", None)
    if set(config.strings("layer_types")) - {"full_attention"}:
        raise config.wrong("layer_types", "full_attention only")


def decoder(
    config: Config, layers: Iterable[LayerSpec], logit_scale: float = 1.0, **facts: Any
) -> ModelSpec:
    """The whole model around `layers`; `facts` are the ModelSpec fields in which the family
    differs."""
    tied = config.flag("tie_word_embeddings", "tie_embedding")
    usual: dict[str, Any] = {
        "norm": NormSpec(eps=config.number(*EPS)),
        "head": HeadSpec(tied, logit_scale=logit_scale),
    }
    return ModelSpec(
        family=config.values["model_type"],
        d_model=config.integer("hidden_size"),
        vocab=config.integer("vocab_size"),
        context=config.integer("max_position_embeddings"),
        layers=tuple(layers),
        bos_id=next(iter(config.token_ids("bos_token_id")), None),
        eos_ids=config.token_ids("eos_token_id"),
        **usual | facts,
    )


def llama(
    config: Config, layers: Iterable[LayerSpec], logit_scale: float = 1.0, **facts: Any
) -> ModelSpec:
    """A decoder with one rotary table for all of each head."""
    rope, layers = rope_config(config), tuple(layers)
    rope.only("partial_rotary_factor", None, 1)
    attention = (layer.mixer for layer in layers if isinstance(layer.mixer, GqaSpec))
    first = next(attention, None)
    ropes = {ROPE: rope_spec(rope, first.head_dim)} if first else {}
    return decoder(config, layers, logit_scale, ropes=ropes, **facts)
