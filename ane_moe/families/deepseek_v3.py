"""DeepSeek-V3 and what has its architecture (Moonlight-16B-A3B): latent attention, sigmoid scores
with groups and a bias for the choice, shared experts, dense first layers."""

from dataclasses import replace
from typing import Any

from ane_moe.families.config import Config
from ane_moe.families.decoder import (
    ROPE,
    decoder,
    leading_dense,
    mlp,
    shared_expert,
    sigmoid_router,
)
from ane_moe.families.keys import DEEPSEEK_FFN, LAYER, SKELETON, KeyTable, Runs
from ane_moe.families.rope import mscale, rope_config, rope_spec
from ane_moe.families.taps import DEEPSEEK, Taps
from ane_moe.model.mla import MlaSpec
from ane_moe.model.spec import FfnSpec, LayerSpec, ModelSpec, MoeSpec, RopeSpec, RouterSpec

ATTENTION = f"{LAYER}.self_attn"
QUERY, PAIR, SIDES = ("nope", "rotated"), ("kv_rank", "rotated"), ("nope", "value")

UNUSED = tuple(f"layers.{{layer}}.attn.{name}." for name in "qkv")
KEYS: KeyTable = {
    **{ours: entries for ours, entries in SKELETON.items() if not ours.startswith(UNUSED)},
    **DEEPSEEK_FFN,
    **{
        f"layers.{{layer}}.attn.{ours}.weight": tuple(
            Runs(f"{ATTENTION}.{theirs}.weight", QUERY, part) for theirs in ("q_b_proj", "q_proj")
        )
        for ours, part in (("q_nope", "nope"), ("q_rotated", "rotated"))
    },
    **{
        f"layers.{{layer}}.attn.q_down.{kind}": (f"{ATTENTION}.q_a_proj.{kind}",)
        for kind in ("weight", "bias")
    },
    "layers.{layer}.attn.q_norm.weight": (f"{ATTENTION}.q_a_layernorm.weight",),
    **{
        f"layers.{{layer}}.attn.{ours}.{kind}": (
            Runs(f"{ATTENTION}.kv_a_proj_with_mqa.{kind}", PAIR, part),
        )
        for ours, part in (("latent", "kv_rank"), ("k_rotated", "rotated"))
        for kind in ("weight", "bias")
    },
    "layers.{layer}.attn.latent_norm.weight": (f"{ATTENTION}.kv_a_layernorm.weight",),
    **{
        f"layers.{{layer}}.attn.{ours}.weight": (
            Runs(f"{ATTENTION}.kv_b_proj.weight", SIDES, part),
        )
        for ours, part in (("key_of", "nope"), ("value_of", "value"))
    },
}
TAPS: Taps = DEEPSEEK


def spec(config: Config) -> ModelSpec:
    interleaved = config.flag("rope_interleave") if config.has("rope_interleave") else True
    ffns = leading_dense(config, experts(config, sigmoid_router(config)))
    return latent_model(config, ffns, interleaved=interleaved)


def experts(config: Config, router: RouterSpec) -> MoeSpec:
    """The experts of all DeepSeek models."""
    shared = shared_expert(config, "moe_intermediate_size", "n_shared_experts")
    return MoeSpec(router, mlp(config, "moe_intermediate_size"), shared)


def latent_attention(config: Config, **facts: Any) -> MlaSpec:
    """Latent attention from the usual fields; `facts` are the MlaSpec fields in which the family
    differs."""
    nope, rotated = config.integer("qk_nope_head_dim"), config.integer("qk_rope_head_dim")
    usual: dict[str, Any] = {
        "heads": config.integer("num_attention_heads"),
        "nope": nope,
        "rotated": rotated,
        "value": config.integer("v_head_dim"),
        "kv_rank": config.integer("kv_lora_rank"),
        "q_rank": config.integer("q_lora_rank") if config.nullable("q_lora_rank") else None,
        "scale": (nope + rotated) ** -0.5,
        "rope": ROPE,
        "bias": config.flag("attention_bias"),
    }
    return MlaSpec(**usual | facts)


def rotated_latent_attention(config: Config, **facts: Any) -> tuple[MlaSpec, dict[str, RopeSpec]]:
    """Latent attention and its rotary table."""
    rope, mixer = rope_config(config), latent_attention(config, **facts)
    rope.only("partial_rotary_factor", None, 1)
    if rope.values["rope_type"] != "default" and rope.values.get("mscale_all_dim"):
        scale = mscale(rope.number("factor"), rope.number("mscale_all_dim")) ** 2
        mixer = replace(mixer, scale=mixer.scale * scale)
    return mixer, {ROPE: rope_spec(rope, mixer.rotated)}


def latent_model(config: Config, ffns: list[FfnSpec], **facts: Any) -> ModelSpec:
    """A decoder with latent attention; `facts` are the MlaSpec fields in which the family
    differs."""
    mixer, ropes = rotated_latent_attention(config, **facts)
    return decoder(config, [LayerSpec(mixer, ffn) for ffn in ffns], ropes=ropes)
