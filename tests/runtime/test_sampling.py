"""Sampling against transformers' own logits warpers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from ane_moe.errors import UserError
from ane_moe.loop.sampling import Sampler, nucleus


def hf_probabilities(logits, temperature, top_p):
    scores = torch.tensor(logits, dtype=torch.float64)[None]
    scores = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, scores))
    return torch.softmax(scores, -1)[0].numpy()


@given(
    seed=st.integers(0, 10**6),
    size=st.integers(1, 200),
    temperature=st.floats(0.1, 5),
    top_p=st.floats(0.05, 0.999),
)
@settings(max_examples=100, deadline=None)
def test_the_nucleus_is_the_one_transformers_keeps(seed, size, temperature, top_p):
    logits = np.random.default_rng(seed).normal(scale=3, size=size).astype(np.float32)
    ids, probabilities = nucleus(logits, temperature, top_p)
    ours = np.zeros(size)
    ours[ids] = probabilities
    np.testing.assert_allclose(ours, hf_probabilities(logits, temperature, top_p), atol=1e-9)


def test_draws_follow_the_probabilities():
    logits = np.log(np.array([0.1, 0.5, 0.05, 0.35], np.float32))
    sampler = Sampler(temperature=1.0, top_p=0.9, seed=3)
    counts = np.bincount([sampler.pick(logits) for _ in range(20000)], minlength=4) / 20000
    np.testing.assert_allclose(counts, hf_probabilities(logits, 1.0, 0.9), atol=0.015)


def test_the_same_seed_draws_the_same_ids_and_another_seed_does_not():
    logits = np.random.default_rng(0).normal(size=100).astype(np.float32)

    def draws(seed):
        sampler = Sampler(1.0, 1.0, seed)
        return [sampler.pick(logits) for _ in range(50)]

    assert draws(7) == draws(7) != draws(8)


def test_greedy_takes_the_lowest_id_of_equal_logits():
    assert Sampler().pick(np.array([0, 2, 1, 2], np.float32)) == 1


def test_a_tie_at_the_edge_of_the_nucleus_goes_to_the_lowest_id():
    ids, _ = nucleus(np.array([1, 3, 1, 1], np.float32), 1.0, 0.8)
    assert ids.tolist() == [1, 0]


def test_a_vanishing_temperature_is_greedy():
    logits = np.random.default_rng(1).normal(size=50).astype(np.float32)
    assert {Sampler(1e-6, 1.0, seed).pick(logits) for seed in range(20)} == {int(np.argmax(logits))}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error(bad):
    with pytest.raises(UserError, match="not finite"):
        Sampler().pick(np.array([0, bad, 1], np.float32))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"temperature": float("inf")},
        {"top_p": float("nan")},
    ],
)
def test_senseless_options_are_refused(options):
    with pytest.raises(UserError):
        Sampler(**options)
