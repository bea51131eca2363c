"""A.X-K2: DeepSeek-V3.2's layer with gated norms; what queries are made of also gates what is
attended to."""

from dataclasses import replace

from ane_moe.families.axk1 import by_count
from ane_moe.families.config import Config
from ane_moe.families.decoder import listed_dense, sigmoid_router
from ane_moe.families.deepseek_v3 import ATTENTION, experts, latent_model
from ane_moe.families.deepseek_v3 import KEYS as DEEPSEEK_V3
from ane_moe.families.deepseek_v3 import TAPS as TAPS
from ane_moe.families.deepseek_v32 import BESIDE as BESIDE
from ane_moe.families.deepseek_v32 import INDEX_KEYS, indexer
from ane_moe.families.keys import LAYER, KeyTable, Runs
from ane_moe.model.spec import ModelSpec

BY_HEAD = {"q_nope": "nope", "q_rotated": "rotated", "gate": "value"}
NORMS = {"attn": "input_layernorm", "ffn": "post_attention_layernorm"}
# What released files call them, and what transformers does.
GATES = {"gate_down": ("W_down", "mlp.fc1"), "gate_up": ("W_up", "mlp.fc2")}
QUERIES = ("q_b_proj", "q_gate_proj")

KEYS: KeyTable = {
    **DEEPSEEK_V3,
    **INDEX_KEYS,
    **{
        f"layers.{{layer}}.attn.{ours}.weight": tuple(
            Runs(f"{ATTENTION}.{name}.weight", tuple(BY_HEAD.values()), part) for name in QUERIES
        )
        for ours, part in BY_HEAD.items()
    },
    **{
        f"layers.{{layer}}.{half}.norm.{ours}.weight": tuple(
            f"{LAYER}.{norm}.{name}.weight" for name in names
        )
        for half, norm in NORMS.items()
        for ours, names in GATES.items()
    },
    "layers.{layer}.attn.norm.weight": (f"{LAYER}.input_layernorm.norm.weight",),
    "layers.{layer}.ffn.norm.weight": (
        f"{LAYER}.post_attention_layernorm.norm.weight",
        f"{LAYER}.post_attention_layernorm.weight",  # of dense layers
    ),
}


def spec(config: Config) -> ModelSpec:
    for name in ("n_group", "topk_group"):  # closed groups of AXK2TopkRouter count as zeros
        config.only(name, None, 1)
    config.only("rope_interleave", None, True)
    config.integer("q_lora_rank")
    plain = Config(config.values | {"n_group": 1, "topk_group": 1}, config.where)
    ffns = listed_dense(config, experts(config, sigmoid_router(plain)), by_count(config))
    whole = latent_model(config, ffns, gated_by_query=True, indexer=indexer(config))
    return replace(whole, norm=replace(whole.norm, gate_rank=config.integer("gated_norm_rank")))
