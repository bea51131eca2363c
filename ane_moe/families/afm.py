"""AFM on device: the last layers read the keys and values of one layer before them; these are
rounded to 8 bits.

Source: arXiv 2507.13575, mlx-lm's `afm7`. No checkpoints are public: `original/afm.py` says how one
is laid out.
"""

from typing import Any

from ane_moe.families.config import Config
from ane_moe.families.decoder import gqa_facts, llama, mlp, n_layers
from ane_moe.families.keys import LAYER, SKELETON, KeyTable, Paired, mlp_keys, paired_queries
from ane_moe.families.taps import Taps
from ane_moe.model.spec import GqaSpec, LayerSpec, ModelSpec, SharedGqaSpec

KEYS: KeyTable = {
    **SKELETON,
    **paired_queries(),
    **{
        f"layers.{{layer}}.attn.{name}_norm.weight": (
            Paired(f"{LAYER}.self_attn.{name}_norm.weight"),
        )
        for name in "qk"
    },
    "layers.{layer}.attn.k_scale.weight": (f"{LAYER}.self_attn.quant_key_scale",),
    "layers.{layer}.attn.v_scale.weight": (f"{LAYER}.self_attn.quant_value_scale",),
    **mlp_keys("ffn.mlp", "mlp"),
}
TAPS = Taps(hands_on=True)


def published(name: str) -> dict[str, Any] | None:
    """The configuration that mlx-lm has, of 3,111,368,064 weights."""
    if name != "afm-3b":
        return None
    return {
        "model_type": "afm",
        "vocab_size": 153600,
        "hidden_size": 2048,
        "intermediate_size": 6656,
        "num_hidden_layers": 56,
        "num_kv_reuse_layers": 21,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }


def spec(config: Config) -> ModelSpec:
    count = n_layers(config)
    reusing = config.integer("num_kv_reuse_layers", at_least=0)
    if reusing >= count:
        raise config.wrong("num_kv_reuse_layers", f"fewer than all {count} layers")
    facts = gqa_facts(config, qk_norm="rotated", rounded=True)
    ffn, own = mlp(config, "intermediate_size"), count - reusing
    shared = SharedGqaSpec(**facts, source=own - 1)
    layers = [LayerSpec(GqaSpec(**facts), ffn)] * own + [LayerSpec(shared, ffn)] * reusing
    return llama(config, layers)
