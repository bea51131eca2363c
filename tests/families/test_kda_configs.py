"""Configurations of models with Kimi delta attention, as they are released and as they may not
be."""

from typing import Any

import pytest

from ane_moe.errors import UserError
from ane_moe.families import describe_config
from ane_moe.model.kda import KdaSpec
from ane_moe.model.mla import MlaSpec

# Kimi-Linear-48B-A3B's published sizes, under the names of its own config.json.
KIMI: dict[str, Any] = {
    "model_type": "kimi_linear",
    "bos_token_id": 163584,
    "eos_token_id": 163586,
    "first_k_dense_replace": 1,
    "head_dim": 72,
    "hidden_act": "silu",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "kv_lora_rank": 512,
    "linear_attn_config": {
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
        "head_dim": 128,
        "kda_layers": [n for n in range(1, 28) if n % 4 and n != 27],
        "num_heads": 32,
        "short_conv_kernel_size": 4,
    },
    "mla_use_nope": True,
    "model_max_length": 1048576,
    "moe_intermediate_size": 1024,
    "moe_layer_freq": 1,
    "moe_renormalize": True,
    "num_attention_heads": 32,
    "num_expert_group": 1,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_hidden_layers": 27,
    "num_key_value_heads": 32,
    "num_shared_experts": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 2.446,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "v_head_dim": 128,
    "vocab_size": 163840,
}
# Ling-3.0-Flash's, as transformers' class has them.
LING: dict[str, Any] = {
    "model_type": "bailing_hybrid",
    "attention_bias": False,
    "first_k_dense_replace": 2,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 6144,
    "kda_lower_bound": -5.0,
    "kda_safe_gate": True,
    "kv_lora_rank": 512,
    "layer_group_size": 6,
    "max_position_embeddings": 262144,
    "moe_intermediate_size": 768,
    "n_group": 8,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 512,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 42,
    "num_shared_experts": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_theta": 6000000.0,
    "routed_scaling_factor": 2.5,
    "short_conv_kernel_size": 4,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "v_head_dim": 128,
    "vocab_size": 157184,
}


def parameters(values: dict[str, Any]) -> float:
    """In thousand millions."""
    spec = describe_config(values)
    total = 0
    for _, row in spec.weights():
        size = 1
        for length in row.shape:
            size *= length
        total += size
    return total / 1e9


def test_kimi_linear_has_its_published_size_and_layers():
    spec = describe_config(KIMI)
    assert parameters(KIMI) == pytest.approx(49.1, abs=0.05)
    latent = [n + 1 for n, one in enumerate(spec.layers) if isinstance(one.mixer, MlaSpec)]
    assert latent == KIMI["linear_attn_config"]["full_attn_layers"]
    assert spec.layers[0].mixer == KdaSpec(32, 32, 128, 128, 4, 1e-5, rank=128)
    assert spec.layers[3].mixer.rope is None and spec.ropes == {} and spec.context == 1048576


def test_ling_has_its_published_size_and_layers():
    spec = describe_config(LING)
    assert parameters(LING) == pytest.approx(124, abs=1)
    latent = [n + 1 for n, one in enumerate(spec.layers) if isinstance(one.mixer, MlaSpec)]
    assert latent == [6, 12, 18, 24, 30, 36, 42]
    assert spec.layers[0].mixer == KdaSpec(32, 32, 128, 128, 4, 1e-6, floor=5.0)
    assert spec.layers[5].mixer.gated and not spec.layers[0].mixer.rank


@pytest.mark.parametrize(
    ("values", "changes", "said"),
    [
        (KIMI, {"mla_use_nope": False}, "mla_use_nope"),
        (KIMI, {"moe_layer_freq": 2}, "moe_layer_freq"),
        (KIMI, {"linear_attn_config": [1]}, "linear_attn_config.*an object"),
        (KIMI, {"linear_attn_config": {}}, "linear_head_dim"),
        (KIMI, {"linear_attn_config": KIMI["linear_attn_config"] | {"kda_layers": []}}, "layer_ty"),
        (KIMI, {"linear_attn_config": KIMI["linear_attn_config"] | {"head_dim": 40}}, "32"),
        (LING, {"kda_lower_bound": 5.0}, "kda_lower_bound.*a negative number"),
        (LING, {"kda_lower_bound": None}, "kda_lower_bound"),
        (LING, {"kda_safe_gate": None}, "kda_safe_gate"),
        (LING, {"layer_group_size": 0}, "layer_group_size"),
        (LING, {"head_dim": 40}, "multiple of 32"),
    ],
)
def test_what_is_not_understood_is_named(values, changes, said):
    with pytest.raises(UserError, match=said):
        describe_config(values | changes)
