"""The gate looks at the delta, and forgives only what rounding y to fp16 costs a perfect shard."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics.pairwise import cosine_similarity

from ane_moe.verification.metrics import cosine, delta_distance, relative_l2_limit, token_cosines

GATE = 0.999


def case(scale, seed=0, tokens=64, channels=96):
    """fp16 inputs `scale` times as large as the delta, and the delta."""
    rng = np.random.default_rng(seed)
    base = (scale * rng.normal(size=(tokens, channels))).astype(np.float16)
    return base, rng.normal(size=(tokens, channels)).astype(np.float32), rng


def shard_output(base, delta):
    return (base.astype(np.float64) + delta).astype(np.float16)


def test_cosines_equal_scikit_learn():
    _, a, rng = case(1)
    b = rng.normal(size=a.shape)
    assert cosine(a, b) == pytest.approx(
        cosine_similarity(a.reshape(1, -1), b.reshape(1, -1))[0, 0]
    )
    np.testing.assert_allclose(token_cosines(a, b), np.diag(cosine_similarity(a, b)), rtol=1e-6)


@given(scale=st.floats(0, 1000), seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_a_perfect_shard_passes_however_large_its_input_is(scale, seed):
    base, delta, _ = case(scale, seed)
    distance = delta_distance(base, shard_output(base, delta), delta)
    assert distance.margin(GATE) == pytest.approx(1 - GATE, abs=1e-5)


@given(scale=st.floats(0, 1000), seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_an_error_of_a_tenth_of_the_delta_fails_however_large_the_input_is(scale, seed):
    base, delta, rng = case(scale, seed)
    wrong = delta + 0.1 * rng.normal(size=delta.shape)
    assert delta_distance(base, shard_output(base, wrong), delta).margin(GATE) < 0


@given(scale=st.floats(0, 300), seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_an_error_of_a_hundredth_of_the_delta_passes_however_large_the_input_is(scale, seed):
    """Rounding alone takes the raw cosine below the gate from a scale of about 130."""
    base, delta, rng = case(scale, seed)
    right = delta + 0.01 * rng.normal(size=delta.shape)
    assert delta_distance(base, shard_output(base, right), delta).margin(GATE) > 0


def test_rounding_alone_would_fail_the_gate_on_the_raw_cosine():
    base, delta, _ = case(300)
    assert delta_distance(base, shard_output(base, delta), delta).cosine < GATE


def test_the_residual_cannot_hide_a_shard_that_adds_nothing():
    base, delta, _ = case(100)
    distance = delta_distance(base, base, delta)
    assert cosine(base, base + delta) > GATE
    assert (
        distance.cosine == 0
        and distance.relative_l2 == pytest.approx(1)
        and distance.margin(GATE) < -0.9
    )


def test_one_bad_token_shows_in_the_worst_token():
    base, delta, _ = case(1)
    wrong = delta.copy()
    wrong[7] *= -1
    assert delta_distance(
        base, shard_output(base, wrong), delta
    ).worst_token_cosine == pytest.approx(-1, abs=1e-3)


def test_zero_deltas_agree_only_with_zero():
    base, delta, _ = case(1)
    nothing = np.zeros_like(delta)
    assert delta_distance(base, base, nothing).cosine == 1
    assert delta_distance(base, shard_output(base, delta), nothing).cosine == 0


@given(scale=st.floats(0, 300), factor=st.sampled_from([0.9, 1.1, 0.5, 3.0]))
@settings(max_examples=40, deadline=None)
def test_a_wrong_factor_that_the_cosine_cannot_see_fails_on_the_relative_error(scale, factor):
    base, delta, _ = case(scale)
    distance = delta_distance(base, shard_output(base, factor * delta), delta)
    assert distance.relative_l2_margin(relative_l2_limit(GATE)) < 0
    if scale < 1:
        assert distance.margin(GATE) > 0


@given(scale=st.floats(0, 300))
@settings(max_examples=40, deadline=None)
def test_rounding_alone_keeps_the_relative_error_within_its_limit(scale):
    base, delta, rng = case(scale)
    right = delta + 0.01 * rng.normal(size=delta.shape)
    assert (
        delta_distance(base, shard_output(base, right), delta).relative_l2_margin(
            relative_l2_limit(GATE)
        )
        > 0
    )


def test_both_gates_meet_where_an_error_is_at_right_angles_to_the_delta():
    along, across = np.array([[1.0, 0.0]], np.float32), np.array([[0.0, 1.0]], np.float32)
    measured = along + relative_l2_limit(0.97) * across
    assert cosine(measured, along) == pytest.approx(0.97)
