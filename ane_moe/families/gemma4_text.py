"""Gemma 4's language model alone: norms around attention and feed-forward blocks, windows with
smaller heads than full layers, whose keys are values, a dense MLP beside the experts, GELU."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import (
    FULL,
    SLIDING,
    decoder,
    gqa,
    layer_kinds,
    of_layer,
    ropes_by_kind,
    router,
)
from ane_moe.families.keys import LAYER, SKELETON, KeyTable, expert_keys, fused_experts, mlp_keys
from ane_moe.families.taps import Taps
from ane_moe.model.spec import GqaSpec, HeadSpec, LayerSpec, MlpSpec, ModelSpec, MoeSpec

FFN = "layers.{layer}.ffn"
KEYS: KeyTable = {
    **SKELETON,
    "layers.{layer}.attn.residual.after.weight": (f"{LAYER}.post_attention_layernorm.weight",),
    f"{FFN}.norm.weight": (f"{LAYER}.pre_feedforward_layernorm_2.weight",),
    f"{FFN}.router_norm.weight": (f"{LAYER}.router.scale",),
    f"{FFN}.router.weight": (f"{LAYER}.router.proj.weight",),
    f"{FFN}.router.expert_scale": (f"{LAYER}.router.per_expert_scale",),
    **expert_keys(fused_experts("experts.gate_up_proj", "experts.down_proj")),
    f"{FFN}.beside.norm.weight": (f"{LAYER}.pre_feedforward_layernorm.weight",),
    **mlp_keys("ffn.beside.mlp", "mlp"),
    f"{FFN}.beside.after.weight": (f"{LAYER}.post_feedforward_layernorm_1.weight",),
    f"{FFN}.beside.experts_after.weight": (f"{LAYER}.post_feedforward_layernorm_2.weight",),
    f"{FFN}.residual.after.weight": (f"{LAYER}.post_feedforward_layernorm.weight",),
    f"{FFN}.residual.scale": (f"{LAYER}.layer_scalar",),
}
TAPS = Taps(
    ffn_norm="pre_feedforward_layernorm_2",
    score="",
    after="post_feedforward_layernorm",
    layer_scale="layer_scalar",
    beside_norm="pre_feedforward_layernorm",
    values="",
)


def spec(config: Config) -> ModelSpec:
    config.only("enable_moe_block", True)
    config.only("hidden_size_per_layer_input", 0)
    config.only("num_kv_shared_layers", None, 0)
    config.only("use_bidirectional_attention", None, "vision")  # of images alone
    kinds = layer_kinds(config)
    if kinds[-1] != FULL:
        raise config.wrong("layer_types", f"{FULL} in the last layer")
    mixers = [_attention(config, number, kind) for number, kind in enumerate(kinds)]
    moe = MoeSpec(
        router(config, renorm=True, weighed=True),
        _mlp(config, "moe_intermediate_size"),
        beside=_mlp(config, "intermediate_size"),
        router_norm=True,
    )
    cap = "final_logit_softcapping"
    softcap = config.number(cap) if config.has(cap) else None
    ropes = {
        kind: rope
        for kind, mixer in zip(kinds, mixers, strict=True)
        for rope in ropes_by_kind(config, [kind], mixer.head_dim).values()
    }
    return decoder(
        config,
        [LayerSpec(mixer, moe, norms="around", scaled=True) for mixer in mixers],
        ropes=ropes,
        embed_scale=config.integer("hidden_size") ** 0.5,
        head=HeadSpec(config.flag("tie_word_embeddings"), softcap=softcap),
    )


def _mlp(config: Config, width: str) -> MlpSpec:
    config.only("hidden_activation", "gelu_pytorch_tanh")
    return MlpSpec(config.integer(width), activation="gelu")


def _attention(config: Config, number: int, kind: str) -> GqaSpec:
    bias, shared = config.flag("attention_bias"), config.flag("attention_k_eq_v")
    return gqa(
        _of_layer(config, number, kind),
        scale=1.0,
        rope=kind,
        qk_norm="head",
        v_norm=True,
        keys_are_values=shared and kind == FULL,
        qkv_bias=bias,
        o_bias=bias,
        window=config.integer("sliding_window") if kind == SLIDING else None,
    )


def _of_layer(config: Config, number: int, kind: str) -> Config:
    """The fields with the layer's own heads in them: the published files say once what those of
    full layers are, transformers saves them by layer."""
    if (saved := of_layer(config, number)) is not None:
        return saved
    own = {}
    if kind == FULL:
        own["head_dim"] = config.integer("global_head_dim")
        heads = "num_global_key_value_heads"
        if config.flag("attention_k_eq_v") and config.has(heads):
            own["num_key_value_heads"] = config.integer(heads)
    return Config(config.values | own, config.where)
