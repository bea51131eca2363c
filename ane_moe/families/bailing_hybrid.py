"""Ling 3 (Ling-3.0-Flash): delta nets that decay by channel, no faster than a bound, with gated
latent attention between them, sigmoid scores with groups and a bias for the choice."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import FULL, decoder, layer_kinds
from ane_moe.families.deepseek_v3 import KEYS as DEEPSEEK_V3
from ane_moe.families.deepseek_v3 import QUERY, rotated_latent_attention
from ane_moe.families.keys import LAYER, KeyTable, Runs, also_under
from ane_moe.families.kimi_linear import (
    DELTA_KEYS,
    FIELDS,
    LINEAR,
    NET,
    delta_net,
    feed_forward,
)
from ane_moe.families.kimi_linear import TAPS as TAPS
from ane_moe.model.spec import LayerSpec, MixerSpec, ModelSpec

DECAYS = {"decay.weight": "f_proj.weight", "decay.bias": "dt_bias", "decay.rate": "A_log"}
UNUSED = ("layers.{layer}.attn.q_down.", "layers.{layer}.attn.q_norm.")
OWN: KeyTable = {
    **{
        f"layers.{{layer}}.attn.q_{part}.weight": (Runs(f"{NET}.q_proj.weight", QUERY, part),)
        for part in QUERY
    },
    **{
        f"layers.{{layer}}.attn.{ours}": (f"{NET}.{theirs}", f"{NET}.forget_gate.{theirs}")
        for ours, theirs in DECAYS.items()
    },
    **{
        f"layers.{{layer}}.attn.o.{kind}": (f"{NET}.dense.{kind}", f"{NET}.o_proj.{kind}")
        for kind in ("weight", "bias")
    },
    "layers.{layer}.attn.z.weight": (f"{NET}.g_proj.weight",),
    "layers.{layer}.attn.gate.weight": (f"{NET}.g_proj.weight",),
    "embed.weight": ("model.word_embeddings.weight", "model.embed_tokens.weight"),
    "layers.{layer}.ffn.router.choice_bias": (
        f"{LAYER}.mlp.gate.expert_bias",
        f"{LAYER}.mlp.gate.e_score_correction_bias",
    ),
}
LATENT = {ours: entries for ours, entries in DEEPSEEK_V3.items() if not ours.startswith(UNUSED)}
KEYS: KeyTable = also_under({**LATENT, **DELTA_KEYS, **OWN}, ".self_attn.", ".attention.")


def spec(config: Config) -> ModelSpec:
    config = config.renamed(FIELDS)
    attention = Config(config.values | {"q_lora_rank": None}, config.where)
    latent, ropes = rotated_latent_attention(attention, gated=True)
    mixers: dict[str, MixerSpec] = {
        FULL: latent,
        LINEAR: delta_net(_net(config), floor=_floor(config)),
    }
    kinds = layer_kinds(config, known=(FULL, LINEAR), otherwise=lambda n: _kind(config, n))
    ffns = feed_forward(config)
    layers = [LayerSpec(mixers[kind], ffn) for kind, ffn in zip(kinds, ffns, strict=True)]
    return decoder(config, layers, ropes=ropes)


def _kind(config: Config, number: int) -> str:
    return LINEAR if (number + 1) % config.integer("layer_group_size") else FULL


def _net(config: Config) -> Config:
    """transformers, when it saves a model, has `head_dim` say another thing."""
    return config.renamed(
        {
            "head_dim": "linear_head_dim",
            "num_attention_heads": "linear_num_heads",
            "short_conv_kernel_size": "linear_conv_kernel_dim",
        }
    )


def _floor(config: Config) -> float | None:
    """The most that a logarithm of a decay is below 0; None where it may be anything."""
    if not config.flag("kda_safe_gate"):
        return None
    given = config.values.get("kda_lower_bound")
    if isinstance(given, bool) or not isinstance(given, int | float) or not -100 < given < 0:
        raise config.wrong("kda_lower_bound", "a negative number")
    return -float(given)
