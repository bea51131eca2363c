"""LongCat-Flash (LongCat-Flash-Chat): a layer has two latent attentions and two MLPs; what its
experts give for what the first MLP reads is added after the second. Some experts compute nothing.

Three layers of ours are one of these: the first attention with the experts, the first MLP alone,
and the second attention with its MLP.
"""

from collections.abc import Iterator
from dataclasses import replace

from ane_moe.families.config import MAX_EXPERTS, MAX_LAYERS, Config
from ane_moe.families.decoder import decoder, mlp, router
from ane_moe.families.deepseek_v3 import ATTENTION, rotated_latent_attention
from ane_moe.families.deepseek_v3 import KEYS as DEEPSEEK_V3
from ane_moe.families.keys import (
    LAYER,
    SKELETON,
    Entry,
    KeyTable,
    each_expert,
    expert_keys,
    mlp_keys,
)
from ane_moe.families.taps import Taps
from ane_moe.model.mla import MlaSpec
from ane_moe.model.spec import LayerSpec, MlpSpec, ModelSpec, MoeSpec

NORMS = {"attn": "input_layernorm", "ffn": "post_attention_layernorm"}


def _of_half(entry: Entry) -> Entry:
    """Where one of the two attentions has what a layer's only one has elsewhere."""
    own = f"{ATTENTION}.{{half}}"
    if isinstance(entry, str):
        return entry.replace(ATTENTION, own)
    return replace(entry, key=entry.key.replace(ATTENTION, own))


KEYS: KeyTable = {
    **{ours: SKELETON[ours] for ours in ("embed.weight", "head.norm.weight", "head.rows.weight")},
    **{
        ours: tuple(_of_half(entry) for entry in entries)
        for ours, entries in DEEPSEEK_V3.items()
        if ours.startswith("layers.{layer}.attn.")
    },
    **{
        f"layers.{{layer}}.{half}.norm.weight": (f"{LAYER}.{norm}.{{half}}.weight",)
        for half, norm in NORMS.items()
    },
    "layers.{layer}.ffn.router.weight": (f"{LAYER}.mlp.router.classifier.weight",),
    "layers.{layer}.ffn.router.choice_bias": (f"{LAYER}.mlp.router.e_score_correction_bias",),
    **expert_keys(each_expert("mlp.experts", "gate_proj", "up_proj", "down_proj")),
    **mlp_keys("ffn.mlp", "mlps.{half}"),
}
TAPS = Taps(
    choice_bias="e_score_correction_bias",
    pieces=(
        {
            "input_layernorm": "input_layernorm.0",
            "self_attn": "self_attn.0",
            "post_attention_layernorm": "post_attention_layernorm.0",
            "mlp": "mlp",
        },
        {"post_attention_layernorm": "post_attention_layernorm.0", "mlp": "mlps.0"},
        {
            "input_layernorm": "input_layernorm.1",
            "self_attn": "self_attn.1",
            "post_attention_layernorm": "post_attention_layernorm.1",
            "mlp": "mlps.1",
        },
    ),
)


def spec(config: Config) -> ModelSpec:
    # Published files say nothing of these.
    config = config.renamed({}, hidden_act="silu", tie_word_embeddings=False)
    heads = config.integer("num_attention_heads")
    config.only("num_key_value_heads", None, heads)
    config.only("router_bias", None, False)  # LongcatFlashTopkRouter reads none
    config.only("zero_expert_type", None, "identity")
    for scaled in ("mla_scale_q_lora", "mla_scale_kv_lora"):
        config.only(scaled, None, True)
    d_model, q_rank = config.integer("hidden_size"), config.integer("q_lora_rank")
    latent_scale = (d_model / config.integer("kv_lora_rank")) ** 0.5
    mixer, ropes = rotated_latent_attention(config, latent_scale=latent_scale)
    config.only("head_dim", None, mixer.rotated)
    config.only("qk_head_dim", None, mixer.nope + mixer.rotated)
    mixer = replace(mixer, scale=mixer.scale * (d_model / q_rank) ** 0.5)
    count = config.integer("num_layers", at_most=MAX_LAYERS // 3)
    layers = _layers(count, mixer, _experts(config), mlp(config, "ffn_hidden_size"))
    return decoder(config, layers, ropes=ropes)


def _layers(count: int, mixer: MlaSpec, moe: MoeSpec, dense: MlpSpec) -> Iterator[LayerSpec]:
    for number in range(count):
        first, second = (number, 0), (number, 1)
        yield LayerSpec(mixer, moe, hands_on=True, stored=first)
        yield LayerSpec(None, dense, stored=first)
        yield LayerSpec(mixer, dense, takes=True, stored=second)


def _experts(config: Config) -> MoeSpec:
    name = "zero_expert_num"
    idle = config.integer(name, at_least=0, at_most=MAX_EXPERTS) if config.has(name) else 0
    scale = config.number("routed_scaling_factor")
    chosen = router(config, renorm=False, bias=True, scale=scale, idle=idle)
    return MoeSpec(chosen, mlp(config, "expert_ffn_hidden_size"))
