"""ZAYA1 (ZAYA1-8B): compressed convolutional attention, a router that carries its state from layer
to layer, one expert or none for each token, affine residuals."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import decoder, mlp, n_layers, ropes_by_kind
from ane_moe.families.keys import (
    LAYER,
    SKELETON,
    KeyTable,
    expert_keys,
    fused_experts,
    stacked_pairs,
)
from ane_moe.families.taps import Taps
from ane_moe.model.cca import CcaSpec
from ane_moe.model.eda_router import EdaRouterSpec
from ane_moe.model.spec import LayerSpec, ModelSpec, MoeSpec

PROJECTION = f"{LAYER}.self_attn.qkv_proj"
GATE = f"{LAYER}.mlp.gate"


def _residual_keys(ours: str, theirs: str) -> KeyTable:
    names = {"added": "hidden_states", "stream": "residual"}
    return {
        f"layers.{{layer}}.{ours}.residual.{name}_{kind}": (f"{LAYER}.{theirs}.{their}_{kind}",)
        for name, their in names.items()
        for kind in ("bias", "scale")
    }


KEYS: KeyTable = {
    **SKELETON,
    "layers.{layer}.attn.entry.bias": ("model.input_hidden_states_bias",),
    "layers.{layer}.attn.entry.scale": ("model.input_hidden_states_scale",),
    "layers.{layer}.attn.q.weight": (f"{PROJECTION}.q_proj.weight",),
    "layers.{layer}.attn.k.weight": (f"{PROJECTION}.k_proj.weight",),
    "layers.{layer}.attn.v_current.weight": (f"{PROJECTION}.v_proj_current.weight",),
    "layers.{layer}.attn.v_delayed.weight": (f"{PROJECTION}.v_proj_delayed.weight",),
    "layers.{layer}.attn.temperature.weight": (f"{LAYER}.self_attn.qk_norm.temp",),
    **{
        f"layers.{{layer}}.attn.{ours}.{kind}": (f"{PROJECTION}.{theirs}.{kind}",)
        for ours, theirs in {
            "by_channel": "conv_qk_depthwise",
            "by_head": "conv_qk_grouped",
        }.items()
        for kind in ("weight", "bias")
    },
    **_residual_keys("attn", "post_attention_residual_scale"),
    "layers.{layer}.ffn.router.choice_bias": (f"{GATE}.balancing_biases",),
    "layers.{layer}.ffn.router.carry_scale": (f"{GATE}.router_states_scale",),
    **{
        f"layers.{{layer}}.ffn.router.down.{kind}": (f"{GATE}.down_proj.{kind}",)
        for kind in ("weight", "bias")
    },
    "layers.{layer}.ffn.router.norm.weight": (f"{GATE}.router_mlp.norm.weight",),
    **{
        f"layers.{{layer}}.ffn.router.{name}.{kind}": (f"{GATE}.router_mlp.{name}.{kind}",)
        for name in ("fc1", "fc2")
        for kind in ("weight", "bias")
    },
    "layers.{layer}.ffn.router.out.weight": (f"{GATE}.router_mlp.out_proj.weight",),
    **expert_keys(
        fused_experts("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        stacked_pairs("mlp.experts"),  # as alternating_zaya.py names them
    ),
    **_residual_keys("ffn", "post_mlp_residual_scale"),
}
TAPS = Taps(
    carry="router",
    skip=True,
    entry=True,
    choice_bias="balancing_biases",
    residuals=("post_attention_residual_scale", "post_mlp_residual_scale"),
)


def spec(config: Config) -> ModelSpec:
    config.only("num_experts_per_tok", 1)
    for bias in ("attention_bias", "lm_head_bias"):
        # A file without the field has no such tensors, as its keys prove.
        config.only(bias, None, False)
    count = n_layers(config)
    kinds = config.strings("layer_types") or ("hybrid",) * count
    if len(kinds) != count:
        raise config.wrong("layer_types", f"{count} of hybrid or hybrid_sliding")
    mixers = {kind: _mixer(config, kind) for kind in dict.fromkeys(kinds)}
    layers = [
        LayerSpec(mixers[kind], _moe(config, first=number == 0), affine=True, entry=number == 0)
        for number, kind in enumerate(kinds)
    ]
    ropes = ropes_by_kind(config, mixers, config.integer("head_dim"))
    return decoder(config, layers, ropes=ropes)


def _mixer(config: Config, kind: str) -> CcaSpec:
    if kind not in ("hybrid", "hybrid_sliding"):
        raise config.wrong("layer_types", "hybrid or hybrid_sliding")
    heads, kv_heads = config.integer("num_attention_heads"), config.integer("num_key_value_heads")
    if heads % kv_heads:
        raise config.wrong("num_key_value_heads", f"a divisor of num_attention_heads = {heads}")
    head_dim = config.integer("head_dim")
    if kv_heads * head_dim % 2:
        raise config.wrong("num_key_value_heads", "an even number of value channels")
    window = config.integer("sliding_window") if kind == "hybrid_sliding" else None
    taps = config.integer("cca_time0"), config.integer("cca_time1")
    return CcaSpec(heads, kv_heads, head_dim, head_dim**-0.5, kind, taps, window)


def _moe(config: Config, first: bool) -> MoeSpec:
    width, eps = config.integer("router_hidden_size"), config.number("rms_norm_eps")
    router = EdaRouterSpec(config.integer("num_experts"), width, takes=not first, eps=eps)
    return MoeSpec(router, mlp(config, "moe_intermediate_size"))
