"""Qwen3-Next (Qwen3-Next-80B-A3B): gated delta nets with gated attention between them, a quarter of
each head rotated, norms about one, an always-on expert behind a sigmoid gate."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import (
    FULL,
    gqa,
    layer_kinds,
    llama,
    mlp,
    router,
)
from ane_moe.families.keys import LAYER, AroundOne, KeyTable, Runs, mlp_keys
from ane_moe.families.qwen2_moe import KEYS as QWEN2_MOE
from ane_moe.families.qwen2_moe import moe_layers
from ane_moe.families.rope import rope_config
from ane_moe.families.taps import Taps
from ane_moe.model.delta_net import DeltaNetSpec
from ane_moe.model.spec import (
    FfnSpec,
    LayerSpec,
    MixerSpec,
    ModelSpec,
    MoeSpec,
    RouterSpec,
    SharedSpec,
)

LINEAR = "linear_attention"
NET = f"{LAYER}.linear_attn"
HALVES = ("head_dim", "gate_rows")  # of each head
BY_KEY_HEAD = ("query_rows", "key_rows", "value_rows", "z_rows")
SCALARS = ("beta_rows", "decay_rows")

DENSE = mlp_keys("ffn.mlp", "mlp")

# What both of Qwen's families with delta nets have.
DELTA_KEYS: KeyTable = {
    **{ours: entries for ours, entries in QWEN2_MOE.items() if ours not in DENSE},
    **{
        f"layers.{{layer}}.attn.{ours}.weight": (
            Runs(f"{LAYER}.self_attn.q_proj.weight", HALVES, part),
        )
        for ours, part in zip(("q", "gate"), HALVES, strict=True)
    },
    **{
        ours: (AroundOne(theirs),)
        for ours, (theirs, *_) in QWEN2_MOE.items()
        if ours.endswith("norm.weight") and isinstance(theirs, str)
    },
    "layers.{layer}.attn.decay.bias": (f"{NET}.dt_bias",),
    "layers.{layer}.attn.decay.rate": (f"{NET}.A_log",),
    "layers.{layer}.attn.conv.weight": (f"{NET}.conv1d.weight",),
    "layers.{layer}.attn.value_norm.weight": (f"{NET}.norm.weight",),
    "layers.{layer}.attn.o.weight": (
        f"{LAYER}.self_attn.o_proj.weight",
        f"{NET}.out_proj.weight",
    ),
}
KEYS: KeyTable = {
    **DELTA_KEYS,
    **DENSE,
    **{
        f"layers.{{layer}}.attn.{part.removesuffix('_rows')}.weight": (
            Runs(f"{NET}.{theirs}.weight", parts, part),
        )
        for theirs, parts in (("in_proj_qkvz", BY_KEY_HEAD), ("in_proj_ba", SCALARS))
        for part in parts
    },
}
TAPS = Taps()


def spec(config: Config) -> ModelSpec:
    moe = experts(config, router(config, config.flag("norm_topk_prob")))
    ffns = [moe if sparse else mlp(config, "intermediate_size") for sparse in moe_layers(config)]
    return delta_model(config, ffns)


def experts(config: Config, chosen: RouterSpec) -> MoeSpec:
    """The experts, and the one that is always on."""
    shared = SharedSpec(mlp(config, "shared_expert_intermediate_size"), gated=True)
    return MoeSpec(chosen, mlp(config, "moe_intermediate_size"), shared)


def delta_model(config: Config, ffns: list[FfnSpec]) -> ModelSpec:
    """A decoder of delta nets and gated attention, as `layer_types` says."""
    config.only("attention_bias", None, False)
    rope = rope_config(config)
    if not rope.has("partial_rotary_factor"):
        raise rope.missing("partial_rotary_factor")
    mixers: dict[str, MixerSpec] = {
        FULL: gqa(config, qk_norm="head", gate="sigmoid"),
        LINEAR: _delta_net(config),
    }
    kinds = layer_kinds(config, known=(FULL, LINEAR), otherwise=lambda n: _kind(config, n))
    layers = [LayerSpec(mixers[kind], ffn) for kind, ffn in zip(kinds, ffns, strict=True)]
    return llama(config, layers, partial=True)


def _kind(config: Config, number: int) -> str:
    return LINEAR if (number + 1) % config.integer("full_attention_interval") else FULL


def _delta_net(config: Config) -> DeltaNetSpec:
    keys, values = config.integer("linear_num_key_heads"), config.integer("linear_num_value_heads")
    if values % keys:
        raise config.wrong("linear_num_value_heads", f"a multiple of {keys} key heads")
    key_dim = config.integer("linear_key_head_dim")
    if key_dim % 32:  # the last axis of a state (coremltools issue 2631)
        raise config.wrong("linear_key_head_dim", "a multiple of 32")
    value_dim, taps = (
        config.integer("linear_value_head_dim"),
        config.integer("linear_conv_kernel_dim", at_least=2, at_most=32),
    )
    return DeltaNetSpec(keys, values, key_dim, value_dim, taps, config.number("rms_norm_eps"))
