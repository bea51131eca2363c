"""MiniMax-Text-01's configuration, what is left out of its files, and what is refused."""

from typing import Any

import pytest

from ane_moe.checkpoints.checkpoint import open_checkpoint
from ane_moe.errors import UserError
from ane_moe.families import describe, describe_config
from ane_moe.model.lightning import LightningSpec
from tests.models import make_model, save_checkpoint

LINEAR, FULL = "linear_attention", "full_attention"
# MiniMax-Text-01's published sizes, in transformers' form.
TEXT_01: dict[str, Any] = {
    "model_type": "minimax",
    **{f"{half}_alpha_factor": 3.5565588200778455 for half in ("full_attn", "linear_attn", "mlp")},
    **{f"{half}_beta_factor": 1.0 for half in ("full_attn", "linear_attn", "mlp")},
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 6144,
    "intermediate_size": 9216,
    "layer_types": [FULL if n % 8 == 7 else LINEAR for n in range(80)],
    "max_position_embeddings": 10240000,
    "num_attention_heads": 64,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 200064,
}


def test_the_published_model_has_its_size():
    spec = describe_config(TEXT_01)
    total = 0
    for _, row in spec.weights():
        rows, columns = (*row.shape, 1)[:2]
        total += rows * columns
    assert total / 1e9 == pytest.approx(456, abs=1)
    assert spec.layers[0].mixer == LightningSpec(64, 128, 1e-6)
    assert spec.layers[0].keeps == (3.5565588200778455,) * 2 and spec.layers[0].adds == (1, 1)
    assert not spec.may_scale_stream


def test_what_is_computed_of_slopes_is_left_out(tmp_path):
    checkpoint = open_checkpoint(save_checkpoint(make_model("minimax"), tmp_path))
    left = checkpoint.left_out(describe(checkpoint)[1])
    assert {name.rpartition(".")[2] for name in left["factors of decays, which are computed"]} == {
        "query_decay",
        "key_decay",
        "diagonal_decay",
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head_dim": 40}, "head_dim.*multiple of 32"),
        ({"rotary_dim": 64}, "rotary_dim"),
        ({"layer_types": None}, "layer_types"),
        ({"mlp_alpha_factor": None}, "mlp_alpha_factor"),
        ({"linear_attn_beta_factor": -1}, "linear_attn_beta_factor"),
    ],
)
def test_what_is_not_understood_is_named(changes, said):
    with pytest.raises(UserError, match=said):
        describe_config(TEXT_01 | changes)
