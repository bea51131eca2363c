"""MiniMax-M3 (MiniMax-M3), its language model: q and k norms, a part of each head rotated, norms
about one, a clamped activation everywhere, sigmoid scores with a bias for the choice. Attention
goes to blocks of tokens that an indexer scores highest: of a context of no more blocks, to all."""

from typing import Any

from ane_moe.families.config import Config
from ane_moe.families.decoder import FULL, gqa, layer_kinds, llama, router, text_config
from ane_moe.families.deepseek_v32 import INDEXERS, within
from ane_moe.families.keys import (
    LAYER,
    SKELETON,
    AroundOne,
    KeyTable,
    Rows,
    each_expert,
    expert_keys,
    fused_experts,
)
from ane_moe.families.rope import rope_config
from ane_moe.families.taps import Taps
from ane_moe.model.spec import Clamp, FfnSpec, LayerSpec, MlpSpec, ModelSpec, MoeSpec, SharedSpec

BLOCK = "block_sparse_moe"


def _mlp_keys(ours: str, *theirs: str) -> KeyTable:
    """Of an MLP whose gate and up the files have apart, and transformers in one matrix."""
    both = {name: f"{theirs[-1]}.gate_up_proj.weight" for name in ("gate", "up")}
    return {
        f"layers.{{layer}}.{ours}.{name}.weight": (
            *(f"{LAYER}.{path}.{name}_proj.weight" for path in theirs),
            *([Rows(f"{LAYER}.{both[name]}", part, 2)] if name in both else []),
        )
        for part, name in enumerate(("gate", "up", "down"))
    }


KEYS: KeyTable = {
    **SKELETON,
    **{
        ours: (AroundOne(theirs),)
        for ours, (theirs, *_) in SKELETON.items()
        if ours.endswith("norm.weight") and isinstance(theirs, str)
    },
    **_mlp_keys("ffn.mlp", "mlp"),
    **_mlp_keys("ffn.shared", f"{BLOCK}.shared_experts", "mlp.shared_experts"),
    "layers.{layer}.ffn.router.weight": (
        f"{LAYER}.{BLOCK}.gate.weight",
        f"{LAYER}.mlp.gate.weight",
    ),
    "layers.{layer}.ffn.router.choice_bias": (
        f"{LAYER}.{BLOCK}.e_score_correction_bias",
        f"{LAYER}.mlp.gate.e_score_correction_bias",
    ),
    **expert_keys(
        each_expert(f"{BLOCK}.experts", "w1", "w3", "w2"),
        fused_experts("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    ),
}
# The activation is linear neither in what gate gives nor in what up does.
TAPS = Taps(score="sigmoid", choice_bias="e_score_correction_bias", up="", gate_up="", down="")
BESIDE = {
    INDEXERS: r"^model\.layers\.\d+\.self_attn\.(indexer\.|index_[qk]_)",
    "what joins patches of images": r"^patch_merge_mlp\.",
}
CHOSEN = "minimax_m3_sparse"  # layers whose attention goes to chosen blocks
# What transformers saves for fields of `sparse_attention_config` in the published file.
OLDER = {"sparse_block_size": "index_block_size", "sparse_topk_blocks": "index_topk_blocks"}


def spec(config: Config) -> ModelSpec:
    config = _usual(text_config(config))
    config.only("hidden_act", None, "silu", "swigluoai")
    attention = gqa(config, qk_norm="head")
    clamp = Clamp(config.number("swiglu_limit"), config.number("swiglu_alpha"))
    widths = ("intermediate_size", "shared_intermediate_size", "dense_intermediate_size")
    expert, shared, dense = (MlpSpec(config.integer(width), clamp) for width in widths)
    scale = config.number("routed_scaling_factor")
    chosen = router(config, renorm=True, score="sigmoid", bias=True, scale=scale)
    moe = MoeSpec(chosen, expert, SharedSpec(shared))
    ffns: dict[str, FfnSpec] = {"sparse": moe, "dense": dense}
    kinds = layer_kinds(config, "mlp_layer_types", tuple(ffns))
    layers = [LayerSpec(attention, ffns[kind]) for kind in kinds]
    _rotated(config, attention.head_dim)
    return llama(_limited(config), layers, partial=True)


def _usual(config: Config) -> Config:
    """The fields as transformers saves them: the published file says kinds of layers by numbers,
    and has what is about chosen blocks in an object."""
    name = "sparse_attention_config"
    blocks = config.values.get(name) or {}
    if not isinstance(blocks, dict):
        raise config.wrong(name, "an object")
    values = {new: blocks[old] for old, new in OLDER.items() if old in blocks}
    lists = {
        "layer_types": _kinds(blocks.get("sparse_attention_freq"), FULL, CHOSEN),
        "mlp_layer_types": _kinds(config.values.get("moe_layer_freq"), "dense", "sparse"),
    }
    values |= {field: kinds for field, kinds in lists.items() if not config.has(field)}
    return Config(config.values | values, config.where)


def _kinds(numbers: Any, zero: str, other: str) -> list[str] | None:
    return [other if number else zero for number in numbers] if isinstance(numbers, list) else None


def _rotated(config: Config, head_dim: int) -> None:
    """transformers takes the factor alone; a file that says otherwise beside it is refused."""
    rope = rope_config(config)
    factor = rope.number("partial_rotary_factor") if rope.has("partial_rotary_factor") else 1.0
    config.only("rotary_dim", None, int(head_dim * factor))


def _limited(config: Config) -> Config:
    """With a context of no more blocks than are chosen, where blocks are.

    Source: transformers' `MiniMaxM3VLIndexer`, which takes the best min(index_topk_blocks, blocks)
    and leaves out those after a token alone."""
    if CHOSEN not in layer_kinds(config, known=(FULL, CHOSEN)):
        return config
    return within(config, config.integer("index_topk_blocks") * config.integer("index_block_size"))
