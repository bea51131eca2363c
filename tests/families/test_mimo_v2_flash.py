"""MiMo-V2-Flash's configuration under the names of released files, and what is refused."""

from typing import Any

import pytest

from ane_moe.errors import UserError
from ane_moe.families import describe_config
from ane_moe.model.spec import MlpSpec

FULL, SLIDING = "full_attention", "sliding_attention"
KINDS = [0 if n == 0 or n % 6 == 5 else 1 for n in range(48)]
FLASH: dict[str, Any] = {
    "model_type": "mimo_v2_flash",
    "attention_bias": False,
    "attention_value_scale": 0.707,
    "head_dim": 192,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "hybrid_layer_pattern": KINDS,
    "intermediate_size": 16384,
    "layernorm_epsilon": 1e-05,
    "max_position_embeddings": 262144,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": [0] + 47 * [1],
    "n_group": 1,
    "n_routed_experts": 256,
    "n_shared_experts": None,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "partial_rotary_factor": 0.334,
    "rope_theta": 5000000,
    "routed_scaling_factor": None,
    "sliding_window_size": 128,
    "swa_rope_theta": 10000,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "v_head_dim": 128,
    "vocab_size": 152576,
}


def test_the_published_model_has_its_size_and_layers():
    spec = describe_config(FLASH)
    total = 0
    for _, row in spec.weights():
        rows, columns = (*row.shape, 1)[:2]
        total += rows * columns
    assert total / 1e9 == pytest.approx(309, abs=1)
    windows = [layer.mixer.window for layer in spec.layers]
    assert windows == [129 if kind else None for kind in KINDS]
    assert [layer.mixer.kv_heads for layer in spec.layers] == [8 if kind else 4 for kind in KINDS]
    assert [layer.mixer.sinks for layer in spec.layers] == [bool(kind) for kind in KINDS]
    assert isinstance(spec.layers[0].ffn, MlpSpec) and spec.layers[1].ffn.shared is None
    assert {name: len(rope.inv_freq) for name, rope in spec.ropes.items()} == {
        FULL: 32,
        SLIDING: 32,
    }
    assert {layer.adds for layer in spec.layers} == {(0.707, 1.0)}


def test_transformers_own_names_say_the_same():
    own = {
        "layer_types": [SLIDING if kind else FULL for kind in KINDS],
        "mlp_layer_types": ["dense"] + 47 * ["sparse"],
        "sliding_window": 129,
        "rms_norm_eps": 1e-05,
        "routed_scaling_factor": 1.0,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": base, "partial_rotary_factor": 0.334}
            for kind, base in ((FULL, 5000000), (SLIDING, 10000))
        },
    }
    released = {
        *("hybrid_layer_pattern", "moe_layer_freq", "sliding_window_size", "layernorm_epsilon"),
        *("swa_rope_theta", "partial_rotary_factor", "rope_theta"),
    }
    values = {name: value for name, value in FLASH.items() if name not in released}
    assert describe_config(values | own) == describe_config(FLASH)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hybrid_layer_pattern": [2] * 48}, "hybrid_layer_pattern.*0 and 1"),
        ({"hybrid_layer_pattern": None}, "layer_types"),
        ({"moe_layer_freq": 1}, "moe_layer_freq.*list"),
        ({"swa_rope_theta": None}, "rope_parameters"),
        ({"partial_rotary_factor": None}, "partial_rotary_factor"),
        ({"rope_theta": None}, "rope_theta"),
        ({"partial_rotary_factor": 2}, "partial_rotary_factor"),
        ({"num_key_value_heads": 64}, "num_key_value_heads"),
        ({"attention_value_scale": -1}, "attention_value_scale"),
        ({"v_head_dim": None}, "v_head_dim"),
    ],
)
def test_what_is_not_understood_is_named(changes, said):
    with pytest.raises(UserError, match=said):
        describe_config(FLASH | changes)
