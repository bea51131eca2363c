"""Rotary tables, against transformers' own functions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3MoeConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

from ane_moe.errors import UserError
from ane_moe.families.config import Config
from ane_moe.families.rope import TYPES, rope_config, rope_spec

CONTEXT = 32768
theta = st.floats(100.0, 1e7)
factor = st.floats(1.0, 64.0)
original = st.integers(64, CONTEXT - 1)

PARAMETERS = st.one_of(
    st.fixed_dictionaries({"rope_type": st.just("default"), "rope_theta": theta}),
    st.fixed_dictionaries({"rope_type": st.just("linear"), "rope_theta": theta, "factor": factor}),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("llama3"),
            "rope_theta": theta,
            "factor": factor,
            "low_freq_factor": st.floats(0.5, 2.0),
            "high_freq_factor": st.floats(2.5, 8.0),
            "original_max_position_embeddings": original,
        }
    ),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("yarn"),
            "rope_theta": theta,
            "factor": factor,
            "original_max_position_embeddings": original,
        },
        optional={
            "beta_fast": st.floats(8.0, 64.0),
            "beta_slow": st.floats(0.5, 4.0),
            "attention_factor": st.floats(0.5, 2.0),
            "mscale": st.floats(0.5, 2.0),
            "mscale_all_dim": st.floats(0.5, 2.0),
            "truncate": st.booleans(),
        },
    ),
)


@settings(deadline=None)
@given(PARAMETERS, st.sampled_from([4, 16, 64, 80, 128]))
def test_tables_equal_those_of_transformers(parameters: dict, head_dim: int) -> None:
    config = Qwen3MoeConfig(
        head_dim=head_dim, max_position_embeddings=CONTEXT, rope_parameters=dict(parameters)
    )
    function = ROPE_INIT_FUNCTIONS.get(
        parameters["rope_type"], Qwen3MoeRotaryEmbedding.compute_default_rope_parameters
    )
    expected, attention_factor = function(config)
    table = rope_spec(rope_config(Config({"rope_parameters": parameters})), head_dim)
    # transformers' own fp32 steps leave it about 1e-6 from the exact table, which we round once;
    # 1e-5 and a little more where llama3's blend of two frequencies cancels
    np.testing.assert_allclose(table.inv_freq, expected.numpy(), rtol=5e-5)
    assert table.attention_factor == pytest.approx(attention_factor)


@pytest.mark.parametrize(
    "scaling", [{"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0}]
)
def test_both_generations_of_names_give_the_same_table(scaling: dict) -> None:
    new = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}
    old = {"rope_theta": 1e4, "rope_scaling": scaling}
    assert rope_spec(rope_config(Config(new)), 16) == rope_spec(rope_config(Config(old)), 16)


@pytest.mark.parametrize("kind", ["longrope", "dynamic", "mrope", None, 3, ["yarn"]])
def test_other_rope_types_are_refused_by_name(kind: object) -> None:
    with pytest.raises(
        UserError, match=r"rope_type is not supported.*supported: default, linear, llama3, yarn"
    ):
        rope_spec(
            rope_config(Config({"rope_parameters": {"rope_type": kind, "rope_theta": 1e4}})), 16
        )


@pytest.mark.parametrize("kind", sorted(TYPES))
def test_a_missing_base_frequency_is_named(kind: str) -> None:
    with pytest.raises(UserError, match="lacks"):
        rope_spec(rope_config(Config({"rope_scaling": {"rope_type": kind}})), 16)
