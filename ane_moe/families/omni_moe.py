"""Omni-router (arXiv 2507.05724): all layers, or those of a group, share one router.

No checkpoints are public: `original/omni_moe.py` says how one is laid out.
"""

import re
from dataclasses import replace
from typing import Any

from ane_moe.families.config import MAX_EXPERTS, MAX_LAYERS, Config
from ane_moe.families.decoder import gqa, llama, mlp, n_layers, router
from ane_moe.families.keys import SKELETON, KeyTable, expert_keys, fused_experts
from ane_moe.families.taps import Taps
from ane_moe.model.spec import LayerSpec, ModelSpec, MoeSpec

STACKED = expert_keys(fused_experts("mlp.experts.gate_up_proj", "mlp.experts.down_proj"))
KEYS: KeyTable = {
    **SKELETON,
    "layers.{layer}.ffn.router.weight": ("model.routers.{group}.weight",),
    "layers.{layer}.ffn.router.bias": ("model.routers.{group}.bias",),
    **STACKED,
}
TAPS = Taps()
# Layers x experts of each group, as `4x2-4x4-4x8`: a re-implementation's way to write the paper's
# models. Channels, widths and heads are ours.
NAMED = re.compile(r"omni((?:-[1-9]\d{0,3}x[1-9]\d{0,3}){1,16})")


def published(name: str) -> dict[str, Any] | None:
    """The configuration of groups of layers, such as `omni-4x2-4x4-4x8`; one expert a token."""
    if (named := NAMED.fullmatch(name)) is None:
        return None
    groups = [[*map(int, group.split("x"))] for group in named[1].split("-")[1:]]
    return {
        "model_type": "omni_moe",
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": sum(layers for layers, _ in groups),
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_experts": max(experts for _, experts in groups),
        "expert_groups": groups,
        "shared_router": True,
        "router_bias": True,
        "num_experts_per_tok": 1,
        "norm_topk_prob": False,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }


def spec(config: Config) -> ModelSpec:
    attention, expert = gqa(config), mlp(config, "intermediate_size")
    renorm, bias = config.flag("norm_topk_prob"), config.flag("router_bias")
    layers: list[LayerSpec] = []
    for group, (count, experts) in enumerate(_groups(config)):
        own = replace(config, values=config.values | {"num_experts": experts})
        moe = MoeSpec(router(own, renorm, logit_bias=bias), expert)
        layers += [LayerSpec(attention, moe, router_group=group)] * count
    return llama(config, layers)


def _groups(config: Config) -> list[tuple[int, int]]:
    """Layers and experts of each group that has a router."""
    count = n_layers(config)
    if not config.has("expert_groups"):
        groups = [(count, config.integer("num_experts", at_most=MAX_EXPERTS))]
    else:
        groups = _listed(config, count)
    if config.flag("shared_router"):
        return groups
    return [(1, experts) for layers, experts in groups for _ in range(layers)]


def _listed(config: Config, count: int) -> list[tuple[int, int]]:
    wanted = f"a list of [layers, experts], {count} layers in all"
    listed = config.values["expert_groups"]
    if not isinstance(listed, list) or len(listed) > MAX_LAYERS:
        raise config.wrong("expert_groups", wanted)
    groups = []
    for entry in listed:
        if not (isinstance(entry, list) and len(entry) == 2 and all(map(_counts, entry))):
            raise config.wrong("expert_groups", wanted)
        groups.append((entry[0], entry[1]))
    if sum(layers for layers, _ in groups) != count:
        raise config.wrong("expert_groups", wanted)
    return groups


def _counts(value: object) -> bool:
    return type(value) is int and 1 <= value <= MAX_EXPERTS
