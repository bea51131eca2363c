"""Granite 4 (granite-4.0-h-tiny, h-small): Mamba-2 layers with attention between them, an expert
that every token passes beside the others, four multipliers."""

import math
from collections.abc import Mapping

from ane_moe.families import granitemoe as granite
from ane_moe.families.config import Config
from ane_moe.families.decoder import FULL, decoder, layer_kinds, llama, mlp
from ane_moe.families.granitemoeshared import KEYS as SHARED
from ane_moe.families.granitemoeshared import TAPS as TAPS
from ane_moe.families.granitemoeshared import shared
from ane_moe.families.keys import LAYER, KeyTable, Runs, chunks
from ane_moe.model.mamba2 import Mamba2Spec
from ane_moe.model.spec import LayerSpec, MixerSpec, ModelSpec

LINEAR = "linear_attention"
OLDER = {"attention": FULL, "mamba": LINEAR}  # what the repositories' files call them
IN = ("z_rows", "u_rows", "b_rows", "c_rows", "step_rows")
ROPE = "rope"  # any other type of position stands for none
SIZES = {
    "heads": "mamba_n_heads",
    "head_dim": "mamba_d_head",
    "groups": "mamba_n_groups",
    "state": "mamba_d_state",
    "taps": "mamba_d_conv",
}


def mamba_keys(mixer: str, attention: str) -> KeyTable:
    """The Mamba-2 layers of a model, and what lies elsewhere in its layers of attention."""
    stored = {
        "step.offset": "dt_bias",
        "step.decay": "A_log",
        "skip.weight": "D",
        "conv.weight": "conv1d.weight",
        "conv.bias": "conv1d.bias",
        "value_norm.weight": "norm.weight",
    }
    return {
        **{f"layers.{{layer}}.attn.{own}": (f"{mixer}.{key}",) for own, key in stored.items()},
        **{
            f"layers.{{layer}}.attn.{part.removesuffix('_rows')}.{kind}": (
                Runs(f"{mixer}.in_proj.{kind}", IN, part),
            )
            for part in IN
            for kind in ("weight", "bias")
        },
        **{
            f"layers.{{layer}}.attn.o.{kind}": (
                f"{attention}.o_proj.{kind}",
                f"{mixer}.out_proj.{kind}",
            )
            for kind in ("weight", "bias")
        },
    }


KEYS: KeyTable = {
    **SHARED,
    **mamba_keys(f"{LAYER}.mamba", f"{LAYER}.self_attn"),
    # What is beside the experts is all there is in a model without any.
    **chunks("gate up", "ffn.mlp", "shared_mlp.input_linear.weight"),
    "layers.{layer}.ffn.mlp.down.weight": (f"{LAYER}.shared_mlp.output_linear.weight",),
}


def spec(config: Config) -> ModelSpec:
    rotated = config.values.get("position_embedding_type") == ROPE
    facts = {} if rotated else {"rope": None}
    mixers: dict[str, MixerSpec] = {
        FULL: granite.attention(config, **facts),
        LINEAR: mamba2(_with_head_dim(config), SIZES, eps="rms_norm_eps", bias="mamba_proj_bias"),
    }
    kinds = [mixers[kind] for kind in _kinds(config)]
    if config.integer("num_local_experts", at_least=0):
        layers = granite.layers(config, kinds, shared(config))
    else:
        layers = [LayerSpec(mixer, mlp(config, "shared_intermediate_size")) for mixer in kinds]
    if rotated:
        return llama(config, layers, **granite.scales(config))
    return decoder(config, layers, ropes={}, **granite.scales(config))


def _kinds(config: Config) -> tuple[str, ...]:
    field = "layer_types" if config.has("layer_types") else "layers_block_type"
    kinds = [OLDER.get(kind, kind) for kind in config.strings(field)]
    return layer_kinds(Config(config.values | {field: kinds}, config.where), field, (FULL, LINEAR))


def _with_head_dim(config: Config) -> Config:
    """With the width of a head that the other sizes give where the file leaves it to them."""
    inner, heads = config.integer("mamba_expand") * config.integer("hidden_size"), SIZES["heads"]
    width, rest = divmod(inner, config.integer(heads))
    if rest or config.values.get(SIZES["head_dim"]) not in ("auto", width):
        raise config.wrong(heads, f"heads of {SIZES['head_dim']} that make up {inner} channels")
    return Config(config.values | {SIZES["head_dim"]: width}, config.where)


def mamba2(config: Config, sizes: Mapping[str, str], eps: str, bias: str) -> Mamba2Spec:
    """A Mamba-2 mixer, from the names that a family has for its sizes."""
    config.only("time_step_limit", None, [0.0, math.inf])
    heads, head_dim, groups, state = (
        config.integer(sizes[name]) for name in ("heads", "head_dim", "groups", "state")
    )
    if heads % groups:
        raise config.wrong(sizes["groups"], f"a divisor of {heads} heads")
    if state % 32:  # the last axis of a state (coremltools issue 2631)
        raise config.wrong(sizes["state"], "a multiple of 32")
    taps = config.integer(sizes["taps"], at_least=2, at_most=32)
    conv_bias = config.flag("mamba_conv_bias", "use_conv_bias")
    return Mamba2Spec(
        heads,
        head_dim,
        groups,
        state,
        taps,
        config.number(eps),
        bias=config.flag(bias),
        conv_bias=conv_bias,
    )
