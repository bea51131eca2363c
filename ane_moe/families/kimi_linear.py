"""Kimi Linear (Kimi-Linear-48B-A3B): delta nets that decay by channel, with latent attention
without rotation between them, sigmoid scores with a bias for the choice."""

from dataclasses import replace

from ane_moe.families.config import Config
from ane_moe.families.decoder import (
    FULL,
    decoder,
    layer_kinds,
    leading_dense,
    listed_dense,
    sigmoid_router,
)
from ane_moe.families.deepseek_v3 import KEYS as DEEPSEEK_V3
from ane_moe.families.deepseek_v3 import experts, latent_attention
from ane_moe.families.keys import LAYER, Framed, KeyTable, Rows, also_under
from ane_moe.families.mixtral import KEYS as MIXTRAL
from ane_moe.families.taps import DEEPSEEK, Taps
from ane_moe.model.kda import KdaSpec
from ane_moe.model.spec import FfnSpec, LayerSpec, MixerSpec, ModelSpec

LINEAR = "linear_attention"
# What files say: what transformers' classes, and other families, call it.
FIELDS = {
    "num_expert_group": "n_group",
    "moe_renormalize": "norm_topk_prob",
    "num_shared_experts": "n_shared_experts",
    "model_max_length": "max_position_embeddings",
}
NET_FIELDS = {
    "head_dim": "linear_head_dim",
    "num_heads": "linear_num_heads",
    "short_conv_kernel_size": "linear_conv_kernel_dim",
}
NET, PROJECTIONS = f"{LAYER}.self_attn", ("query", "key", "value")
GATES = {"z_down": "g_a_proj", "z": "g_b_proj"}
DECAYS = {"decay_down": "f_a_proj", "decay": "f_b_proj"}

# What these delta nets have in common.
DELTA_KEYS: KeyTable = {
    **{
        f"layers.{{layer}}.attn.{name}_conv.weight": (
            f"{NET}.{name[0]}_conv1d.weight",
            Rows(f"{NET}.conv1d.weight", part, 3),
        )
        for part, name in enumerate(PROJECTIONS)
    },
    **{
        f"layers.{{layer}}.attn.{name}.weight": (f"{NET}.{name[0]}_proj.weight",)
        for name in PROJECTIONS
    },
    "layers.{layer}.attn.beta.weight": (f"{NET}.b_proj.weight",),
    "layers.{layer}.attn.value_norm.weight": (f"{NET}.o_norm.weight",),
    "layers.{layer}.attn.decay.bias": (f"{NET}.dt_bias", f"{NET}.forget_gate.dt_bias"),
}
KEYS: KeyTable = {
    **also_under(DEEPSEEK_V3, ".mlp.", ".block_sparse_moe."),
    **DELTA_KEYS,
    **{
        f"layers.{{layer}}.attn.{ours}.weight": (f"{NET}.{theirs}.weight",)
        for ours, theirs in GATES.items()
    },
    **{
        f"layers.{{layer}}.attn.{ours}.weight": (
            f"{NET}.{theirs}.weight",
            f"{NET}.forget_gate.{theirs}.weight",
        )
        for ours, theirs in DECAYS.items()
    },
    "layers.{layer}.attn.decay.rate": (
        Framed(f"{NET}.A_log", before=2, after=1),
        Framed(f"{NET}.forget_gate.A_log", before=2, after=1),
    ),
    **{ours: entries for ours, entries in MIXTRAL.items() if ".experts." in ours},
}
# Values pass a convolution and an activation: no multiplier of them can be taken out again.
TAPS: Taps = replace(DEEPSEEK, values="")


def spec(config: Config) -> ModelSpec:
    config = config.renamed(FIELDS, attention_bias=False)
    config.only("mla_use_nope", None, True)
    config.only("moe_layer_freq", None, 1)
    net = _net(config)
    mixers: dict[str, MixerSpec] = {
        FULL: latent_attention(config, rope=None, interleaved=False),
        LINEAR: delta_net(net, rank=net.integer("linear_head_dim")),
    }
    ffns = feed_forward(config)
    layers = [LayerSpec(mixers[kind], ffn) for kind, ffn in zip(_kinds(net), ffns, strict=True)]
    return decoder(config, layers, ropes={})


def delta_net(config: Config, rank: int | None = None, floor: float | None = None) -> KdaSpec:
    """A delta net that decays by channel, from the usual fields."""
    width, heads = config.integer("linear_head_dim"), config.integer("linear_num_heads")
    if width % 32:  # the last axis of a state (coremltools issue 2631)
        raise config.wrong("linear_head_dim", "a multiple of 32")
    taps = config.integer("linear_conv_kernel_dim", at_least=2, at_most=32)
    eps = config.number("rms_norm_eps")
    return KdaSpec(heads, heads, width, width, taps, eps, rank=rank, floor=floor)


def _net(config: Config) -> Config:
    """With what released files have in an object of its own."""
    given = config.values.get("linear_attn_config") or {}
    if not isinstance(given, dict):
        raise config.wrong("linear_attn_config", "an object")
    listed = {name: given.get(name) for name in ("full_attn_layers", "kda_layers")}
    own = {ours: given[theirs] for theirs, ours in NET_FIELDS.items() if theirs in given}
    return Config(config.values | own | listed, config.where)


def _kinds(net: Config) -> tuple[str, ...]:
    """By name, or out of two lists that count layers from 1."""
    listed = {number: FULL for number in net.integers("full_attn_layers")}
    listed |= {number: LINEAR for number in net.integers("kda_layers")}
    known = (FULL, LINEAR)
    return layer_kinds(net, known=known, otherwise=lambda n: listed.get(n + 1, ""))


def feed_forward(config: Config) -> list[FfnSpec]:
    """The feed-forward block of each layer, as a list of them says, or a number of dense ones."""
    moe = experts(config, sigmoid_router(config))
    return (listed_dense if config.has("mlp_layer_types") else leading_dense)(config, moe)
