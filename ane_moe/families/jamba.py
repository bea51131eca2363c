"""Jamba (Jamba-v0.1): Mamba layers with attention without rotation between them, experts in every
other layer and an MLP as wide in the others."""

import math

from ane_moe.families.config import Config
from ane_moe.families.decoder import decoder, gqa, mlp, n_layers, router
from ane_moe.families.keys import (
    LAYER,
    SKELETON,
    KeyTable,
    Runs,
    each_expert,
    expert_keys,
    fused_experts,
    mlp_keys,
)
from ane_moe.families.taps import Taps
from ane_moe.model.mamba import MambaSpec
from ane_moe.model.recent import WIDTH
from ane_moe.model.spec import LayerSpec, ModelSpec, MoeSpec

MIXER = f"{LAYER}.mamba"
IN, MIXED = ("u_rows", "z_rows"), ("step_in_rows", "b_rows", "c_rows")
STORED = {
    "conv.weight": "conv1d.weight",
    "conv.bias": "conv1d.bias",
    "step_in_norm.weight": "dt_layernorm.weight",
    "b_norm.weight": "b_layernorm.weight",
    "c_norm.weight": "c_layernorm.weight",
    "step.weight": "dt_proj.weight",
    "step.bias": "dt_proj.bias",
    "decay.weight": "A_log",
    "skip.weight": "D",
}

KEYS: KeyTable = {
    **SKELETON,
    "head.norm.weight": ("model.final_layernorm.weight",),
    "layers.{layer}.ffn.norm.weight": (f"{LAYER}.pre_ff_layernorm.weight",),
    **{f"layers.{{layer}}.attn.{ours}": (f"{MIXER}.{theirs}",) for ours, theirs in STORED.items()},
    **{
        f"layers.{{layer}}.attn.{part.removesuffix('_rows')}.{kind}": (
            Runs(f"{MIXER}.{theirs}.{kind}", parts, part),
        )
        for theirs, parts, kind in (
            ("in_proj", IN, "weight"),
            ("in_proj", IN, "bias"),
            ("x_proj", MIXED, "weight"),
        )
        for part in parts
    },
    "layers.{layer}.attn.o.weight": (
        f"{LAYER}.self_attn.o_proj.weight",
        f"{MIXER}.out_proj.weight",
    ),
    "layers.{layer}.attn.o.bias": (f"{MIXER}.out_proj.bias",),
    **mlp_keys("ffn.mlp", "feed_forward"),
    "layers.{layer}.ffn.router.weight": (f"{LAYER}.feed_forward.router.weight",),
    **expert_keys(
        each_expert("feed_forward.experts", "gate_proj", "up_proj", "down_proj"),
        fused_experts("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
    ),
}
TAPS = Taps(ffn_norm="pre_ff_layernorm")


def spec(config: Config) -> ModelSpec:
    attention, mamba = gqa(config, rope=None), _mamba(config)
    dense = mlp(config, "intermediate_size")
    moe = MoeSpec(router(config, renorm=False), dense)
    sparse = _every(config, "expert_layer") if moe.router.experts > 1 else set()
    attending = _every(config, "attn_layer")
    layers = [
        LayerSpec(attention if n in attending else mamba, moe if n in sparse else dense)
        for n in range(n_layers(config))
    ]
    return decoder(config, layers, ropes={})


def _every(config: Config, layer: str) -> set[int]:
    """The layers that two fields of the configuration name: one of so many, and its place."""
    period = config.integer(f"{layer}_period")
    offset = config.integer(f"{layer}_offset", at_least=0, at_most=period - 1)
    return {*range(offset, n_layers(config), period)}


def _mamba(config: Config) -> MambaSpec:
    d_model, state = config.integer("hidden_size"), config.integer("mamba_d_state")
    inner = config.integer("mamba_expand") * d_model
    if inner * state % WIDTH:  # the last axis of a state (coremltools issue 2631)
        raise config.wrong("mamba_d_state", f"{inner} times it a multiple of {WIDTH}")
    wide = config.values.get("mamba_dt_rank") == "auto"
    return MambaSpec(
        inner,
        state,
        math.ceil(d_model / 16) if wide else config.integer("mamba_dt_rank"),
        config.integer("mamba_d_conv", at_least=2, at_most=32),
        config.number("rms_norm_eps"),
        bias=config.flag("mamba_proj_bias"),
        conv_bias=config.flag("mamba_conv_bias"),
    )
