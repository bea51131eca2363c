"""Step-3.7 (Step-3.7-Flash), its language model: a gate for each head, more heads in windows, norms
about one, sigmoid scores with a bias for the choice, limits of the activation by layer."""

from typing import Any

from ane_moe.families.config import Config
from ane_moe.families.decoder import (
    FULL,
    SLIDING,
    decoder,
    gqa,
    layer_kinds,
    mlp,
    n_layers,
    of_layer,
    ropes_by_kind,
    router,
    text_config,
)
from ane_moe.families.keys import LAYER, SKELETON, AroundOne, Fused, KeyTable, expert_keys, mlp_keys
from ane_moe.families.taps import Taps
from ane_moe.model.spec import FfnSpec, GqaSpec, LayerSpec, ModelSpec, MoeSpec, SharedSpec

KEYS: KeyTable = {
    **SKELETON,
    **{
        ours: (AroundOne(theirs),)
        for ours, (theirs, *_) in SKELETON.items()
        if ours.endswith("norm.weight") and isinstance(theirs, str)
    },
    "layers.{layer}.attn.gate.weight": (f"{LAYER}.self_attn.g_proj.weight",),
    **mlp_keys("ffn.mlp", "mlp"),
    "layers.{layer}.ffn.router.weight": (f"{LAYER}.moe.gate.weight",),
    "layers.{layer}.ffn.router.choice_bias": (f"{LAYER}.moe.router_bias",),
    **expert_keys(
        {name: Fused(f"{LAYER}.moe.{name}_proj.weight") for name in ("gate", "up", "down")}
    ),
    **mlp_keys("ffn.shared", "share_expert"),
}
TAPS = Taps(
    score="sigmoid",
    choice_bias="e_score_correction_bias",
)
# What the published file calls fields that transformers saves by other names.
OLDER = {
    "num_attention_groups": "num_key_value_heads",
    "moe_num_experts": "n_routed_experts",
    "moe_top_k": "num_experts_per_tok",
    "share_expert_dims": "share_expert_dim",
}
BY_LAYER = ("layer_types", "mlp_layer_types", "swiglu_limits", "swiglu_limits_shared")


def spec(config: Config) -> ModelSpec:
    config = _usual(text_config(config))
    kinds, sparse = layer_kinds(config), _sparse(config)
    mixers = [_attention(config, number, kind) for number, kind in enumerate(kinds)]
    ffns = [_ffn(config, number, is_moe) for number, is_moe in enumerate(sparse)]
    layers = [LayerSpec(mixer, ffn) for mixer, ffn in zip(mixers, ffns, strict=True)]
    return decoder(config, layers, ropes=ropes_by_kind(config, kinds, mixers[0].head_dim))


def _usual(config: Config) -> Config:
    """The fields as transformers saves them. Lists of the published file go on for layers that
    predict further tokens; its rotary bases are by layer."""
    given = config.values
    values: dict[str, Any] = {new: given[old] for old, new in OLDER.items() if old in given}
    values |= {"hidden_act": "silu", "tie_word_embeddings": False} | given
    count = n_layers(config)
    lists = {name: values[name] for name in BY_LAYER if isinstance(values.get(name), list)}
    values |= {name: listed[:count] for name, listed in lists.items()}
    if not config.has("rope_parameters"):
        values["rope_parameters"] = _ropes(config, values.get("layer_types"))
    return Config(values, config.where)


def _ropes(config: Config, kinds: Any) -> dict[str, dict[str, Any]]:
    bases, factors = config.values.get("rope_theta"), config.values.get("partial_rotary_factors")
    scaling, ropes = config.values.get("rope_scaling"), dict[str, dict[str, Any]]()
    for number, kind in enumerate(kinds if isinstance(kinds, list) else ()):
        base = bases[number] if isinstance(bases, list) and number < len(bases) else bases
        own = {"rope_type": "default", "rope_theta": base}
        if isinstance(factors, list) and number < len(factors):
            own["partial_rotary_factor"] = factors[number]
        if kind == FULL and isinstance(scaling, dict):
            own |= scaling
        ropes.setdefault(str(kind), own)
    return ropes


def _sparse(config: Config) -> list[bool]:
    """Which layers have experts; older files name their numbers, apart by commas."""
    name, numbers = "moe_layers_enum", config.values.get("moe_layers_enum")
    if config.has("mlp_layer_types") or numbers is None:
        kinds = layer_kinds(config, "mlp_layer_types", ("dense", "sparse"))
        return [kind == "sparse" for kind in kinds]
    listed = numbers.split(",") if isinstance(numbers, str) else numbers
    if not isinstance(listed, list) or not all(str(one).strip().isdigit() for one in listed):
        raise config.wrong(name, "numbers of layers")
    chosen = {int(one) for one in listed}
    return [number in chosen for number in range(n_layers(config))]


def _limit(config: Config, name: str, number: int) -> float | None:
    """The limit of a layer; 0 stands for none."""
    limits = config.values.get(name)
    if limits is None:
        return None
    limit = limits[number] if isinstance(limits, list) and number < len(limits) else -1
    if limit is not None and not (isinstance(limit, int | float) and limit >= 0):
        raise config.wrong(name, f"{n_layers(config)} numbers from 0 up")
    return float(limit) if limit else None


def _ffn(config: Config, number: int, sparse: bool) -> FfnSpec:
    limit = _limit(config, "swiglu_limits_shared", number)
    if not sparse:
        return mlp(config, "intermediate_size", limit=limit)
    scale = config.number("moe_router_scaling_factor")
    chosen = router(config, renorm=True, score="sigmoid", bias=True, scale=scale)
    own = _limit(config, "swiglu_limits", number)
    shared = SharedSpec(mlp(config, "share_expert_dim", limit=limit))
    return MoeSpec(chosen, mlp(config, "moe_intermediate_size", limit=own), shared)


def _attention(config: Config, number: int, kind: str) -> GqaSpec:
    config.only("attention_bias", None, False)
    own = of_layer(config, number)
    other = config.values.get("attention_other_setting")
    if own is None:
        heads = other if kind == SLIDING and isinstance(other, dict) else {}
        own = Config(config.values | heads, config.where)
    scalar = "query_pre_attn_scalar" if own.has("query_pre_attn_scalar") else "head_dim"
    return gqa(
        own,
        scale=own.number(scalar) ** -0.5,
        rope=kind,
        qk_norm="head",
        gate="sigmoid",
        gate_by_head=True,
        window=config.integer("sliding_window") if kind == SLIDING else None,
    )
