"""Reads the config fields that the Llama-shaped families share."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from ane_moe.families.config import CHOSEN, EXPERTS, MAX_EXPERTS, MAX_LAYERS, Config
from ane_moe.families.rope import rope_config, rope_spec
from ane_moe.model.spec import (
    Clamp,
    FfnSpec,
    GqaSpec,
    HeadSpec,
    LayerSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    NormSpec,
    RopeSpec,
    RouterSpec,
    SharedSpec,
)

EPS = ("rms_norm_eps", "norm_eps", "layer_norm_epsilon")
ROPE = "main"  # these families have one rotary table
FULL, SLIDING = "full_attention", "sliding_attention"
# gpt-oss's activation, which transformers' code had built in before config.json came to say it.
ALPHA, LIMIT = 1.702, 7.0


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


def mlp(config: Config, width: str, **facts: Any) -> MlpSpec:
    """A gated MLP whose inner width is the field `width`; `facts` are the MlpSpec fields in which
    the family differs."""
    config.only("hidden_act", "silu", "swish")
    return MlpSpec(config.integer(width), **facts)


def clamp(config: Config) -> Clamp:
    """The clamped activation of gpt-oss."""
    limit = config.number("swiglu_limit") if config.has("swiglu_limit") else LIMIT
    return Clamp(limit, config.number("swiglu_alpha") if config.has("swiglu_alpha") else ALPHA)


def router(config: Config, renorm: bool, **facts: Any) -> RouterSpec:
    """The router from the usual fields; `facts` are the RouterSpec fields in which the family
    differs."""
    experts = config.integer(*EXPERTS, at_most=MAX_EXPERTS)
    chosen = [name for name in CHOSEN if config.has(name)]
    k = config.integer(*CHOSEN)
    if k > experts:
        raise config.wrong(chosen[0], f"at most the number of experts, {experts}")
    return RouterSpec(experts, k, renorm, **facts)


def sigmoid_router(config: Config) -> RouterSpec:
    """The router of DeepSeek-V3: sigmoid scores, a bias for the choice, groups, a factor.

    Source: transformers' `DeepseekV3TopkRouter`, whose 1e-20 beside the sum is nothing: a sigmoid
    that adds up to so little is 0 in fp16, and its expert is not chosen.
    """
    scale = config.number("routed_scaling_factor")
    renorm = config.flag("norm_topk_prob")
    chosen = router(config, renorm, score="sigmoid", bias=True, scale=scale)
    groups, opened = config.integer("n_group"), config.integer("topk_group")
    if chosen.experts % groups or (groups > 1 and chosen.experts < 2 * groups):
        raise config.wrong("n_group", f"a divisor of the number of experts, {chosen.experts}")
    if not chosen.k <= opened * (chosen.experts // groups) <= chosen.experts:
        raise config.wrong("topk_group", f"at most {groups}, with {chosen.k} experts in them")
    return replace(chosen, groups=groups, open_groups=opened)


def shared_expert(config: Config, width: str, count: str) -> SharedSpec | None:
    """What stands for `count` always-on experts of the field `width`: one as wide as all of
    them."""
    number = config.integer(count, at_least=0)
    return SharedSpec(MlpSpec(number * config.integer(width))) if number else None


def text_config(config: Config) -> Config:
    """The language model's fields of a configuration that has them in one of its own, beside those
    of other kinds of input."""
    inner = config.values.get("text_config")
    if not isinstance(inner, dict):
        raise config.wrong("text_config", "an object")
    outer = ("model_type", "tie_word_embeddings", "bos_token_id", "eos_token_id")
    own = {name: config.values[name] for name in outer if config.has(name)}
    return Config(inner | own, config.where)


def of_layer(config: Config, number: int) -> Config | None:
    """The fields with those in them that `per_layer_config` gives for one layer, as transformers
    saves them; None where the file has no such field."""
    name = "per_layer_config"
    if not config.has(name):
        return None
    given = config.values[name]
    listed = given.items() if isinstance(given, dict) else ()
    found = (fields for key, fields in listed if key.isdigit() and int(key) == number)
    own: Any = next(found, {})
    if not isinstance(given, dict) or not isinstance(own, dict):
        raise config.wrong(name, "an object of fields for each layer")
    return Config(config.values | own, config.where)


def n_layers(config: Config) -> int:
    """The number of layers."""
    return config.integer("num_hidden_layers", at_most=MAX_LAYERS)


def layer_kinds(
    config: Config,
    field: str = "layer_types",
    known: tuple[str, ...] = (FULL, SLIDING),
    otherwise: Callable[[int], str] | None = None,
) -> tuple[str, ...]:
    """The kind of each layer out of the list `field`, or where the file has none by the rule
    `otherwise`."""
    count, kinds = n_layers(config), config.strings(field)
    if not kinds and otherwise is not None:
        kinds = tuple(map(otherwise, range(count)))
    if len(kinds) != count or set(kinds) - set(known):
        raise config.wrong(field, f"{count} of {' or '.join(known)}")
    return kinds


def layer_windows(
    config: Config, otherwise: Callable[[int], str] | None = None
) -> list[int | None]:
    """Each layer's window, None where it sees all tokens before it."""
    return [
        config.integer("sliding_window") if kind == SLIDING else None
        for kind in layer_kinds(config, otherwise=otherwise)
    ]


def leading_dense(
    config: Config, moe: MoeSpec, field: str = "first_k_dense_replace"
) -> list[FfnSpec]:
    """The feed-forward block of each layer: dense ones of `intermediate_size` first, as many as
    `field` says."""
    dense, count = config.integer(field, at_least=0), n_layers(config)
    return [mlp(config, "intermediate_size") if n < dense else moe for n in range(count)]


def listed_dense(
    config: Config, moe: MoeSpec, otherwise: Callable[[int], str] | None = None
) -> list[FfnSpec]:
    """The feed-forward block of each layer, as `mlp_layer_types` says."""
    kinds = layer_kinds(config, "mlp_layer_types", ("dense", "sparse"), otherwise)
    return [moe if kind == "sparse" else mlp(config, "intermediate_size") for kind in kinds]


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
        "context": config.integer("max_position_embeddings"),
    }
    return ModelSpec(
        family=config.values["model_type"],
        d_model=config.integer("hidden_size"),
        vocab=config.integer("vocab_size"),
        layers=tuple(layers),
        bos_id=next(iter(config.token_ids("bos_token_id")), None),
        eos_ids=config.token_ids("eos_token_id"),
        **usual | facts,
    )


def llama(
    config: Config,
    layers: Iterable[LayerSpec],
    logit_scale: float = 1.0,
    partial: bool = False,
    **facts: Any,
) -> ModelSpec:
    """A decoder with one rotary table for all of each head, or with `partial` for as much of it as
    the configuration says."""
    rope, layers = rope_config(config), tuple(layers)
    if not partial:
        rope.only("partial_rotary_factor", None, 1)
    attention = (layer.mixer for layer in layers if isinstance(layer.mixer, GqaSpec))
    first = next(attention, None)
    ropes = {ROPE: rope_table(rope, first.head_dim)} if first else {}
    return decoder(config, layers, logit_scale, ropes=ropes, **facts)


def rope_table(rope: Config, head_dim: int) -> RopeSpec:
    """The table of heads of so many channels, of which all are rotated, or the first."""
    if rope.values["rope_type"] == "proportional":
        return rope_spec(rope, head_dim)
    factor = rope.number("partial_rotary_factor") if rope.has("partial_rotary_factor") else 1.0
    rotated = int(head_dim * factor)
    if rotated > head_dim or rotated % 2 or rotated != head_dim * factor:
        raise rope.wrong("partial_rotary_factor", "an even number of channels of each head")
    return rope_spec(rope, rotated)


def ropes_by_kind(
    config: Config, kinds: Iterable[str], head_dim: int, partial: bool = True
) -> dict[str, RopeSpec]:
    """A table for each kind of layer. A stray `rope_type` beside the kinds says nothing; YaRN's
    `truncate` is read beside them, as transformers does."""
    tables, ropes = config.values.get("rope_parameters"), {}
    for kind in dict.fromkeys(kinds):
        if not isinstance(tables, dict) or not isinstance(tables.get(kind), dict):
            raise config.wrong("rope_parameters", f"an object for each kind of layer, {kind} too")
        table = tables[kind] | {"truncate": tables.get("truncate", True)}
        own = rope_config(Config({"rope_parameters": table}, config.where))
        if not partial:
            own.only("partial_rotary_factor", None, 1)
        ropes[kind] = rope_table(own, head_dim)
    return ropes
