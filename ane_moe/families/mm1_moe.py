"""MM1's language model with experts: of every `moe_layer_freq` layers the last has some, the others
are dense.

Source: arXiv 2403.09611. No checkpoints are public: `original/mm1_moe.py` says how one is laid out.
A picture's tokens come as embeddings (`convert --inputs embeds`).
"""

from typing import Any

from ane_moe.families.config import MAX_LAYERS, Config
from ane_moe.families.decoder import gqa, llama, mlp, n_layers, router
from ane_moe.families.keys import LAYER, SKELETON, KeyTable, mlp_keys
from ane_moe.families.omni_moe import STACKED
from ane_moe.families.taps import Taps
from ane_moe.model.spec import LayerSpec, ModelSpec, MoeSpec

KEYS: KeyTable = {
    **SKELETON,
    **mlp_keys("ffn.mlp", "mlp"),
    "layers.{layer}.ffn.router.weight": (f"{LAYER}.mlp.gate.weight",),
    **STACKED,
}
TAPS = Taps()
# Experts, layers from one with experts to the next: recalled from arXiv 2403.09611, not verified.
# Then layers, channels, width of a feed-forward block, heads and KV heads: ours, so that totals are
# the 64e9 and 47e9 weights that are recalled too.
SHAPES = {
    "mm1-3b-moe": (64, 2, 32, 2560, 7936, 20, 20),
    "mm1-7b-moe": (32, 4, 32, 4096, 13056, 32, 8),
}
SHORT = {"mm1-3b": "mm1-3b-moe", "mm1-7b": "mm1-7b-moe"}
HEAD_DIM = 128


def published(name: str) -> dict[str, Any] | None:
    """The configuration of a published shape; `mm1-3b` for short."""
    shape = SHAPES.get(SHORT.get(name, name))
    if shape is None:
        return None
    experts, every, layers, channels, width, heads, kv_heads = shape
    return {
        "model_type": "mm1_moe",
        "vocab_size": 32000,
        "hidden_size": channels,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "moe_layer_freq": every,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": HEAD_DIM,
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }


def spec(config: Config) -> ModelSpec:
    attention, dense = gqa(config), mlp(config, "intermediate_size")
    moe = MoeSpec(router(config, config.flag("norm_topk_prob")), dense)
    every = config.integer("moe_layer_freq", at_most=MAX_LAYERS)
    numbers = range(1, n_layers(config) + 1)
    return llama(config, [LayerSpec(attention, dense if n % every else moe) for n in numbers])
