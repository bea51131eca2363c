"""Routing agreement, on cases counted by hand."""

import numpy as np
import pytest
import torch

from ane_moe.verification.routing_parity import compare_routing, near_tie_flips

PROBS = np.array([[0.5, 0.3, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4]], np.float32)
INDICES = np.array([[0, 1], [3, 2]], np.int32)


def test_the_same_experts_in_another_order_agree():
    gates = np.array([[0.6, 0.4, 0, 0], [0, 0, 0.4, 0.6]], np.float16)
    result = compare_routing(5, gates, PROBS, INDICES)
    assert (result.layer, result.tokens, result.set_agreement) == (5, 2, 1.0)
    assert result.mass_outside_top_k == pytest.approx((0.2 + 0.3) / 2)
    assert result.gate_mass_outside_top_k == 0


def test_a_token_with_one_other_expert_does_not_agree():
    gates = np.array([[0.6, 0, 0.4, 0], [0, 0, 0.4, 0.6]], np.float16)
    result = compare_routing(0, gates, PROBS, INDICES)
    assert result.set_agreement == 0.5
    assert result.gate_mass_outside_top_k == pytest.approx(0.4 / 2, abs=1e-3)


def test_a_missing_or_an_extra_expert_does_not_agree():
    gates = np.array([[1, 0, 0, 0], [0, 0.1, 0.4, 0.5]], np.float16)
    assert compare_routing(0, gates, PROBS, INDICES).set_agreement == 0


def test_soft_gates_put_exactly_the_mass_outside_where_it_does_not_belong():
    torch.manual_seed(0)
    probs = torch.randn(50, 16).softmax(-1)
    chosen = probs.topk(4)
    result = compare_routing(0, probs.numpy(), probs.numpy(), chosen.indices.numpy())
    assert result.set_agreement == 0
    assert result.mass_outside_top_k == pytest.approx(
        1 - float(chosen.values.sum(1).mean()), abs=1e-6
    )
    assert result.gate_mass_outside_top_k == pytest.approx(result.mass_outside_top_k, abs=1e-6)


def test_a_flip_counts_as_a_near_tie_only_where_the_golden_was_undecided():
    probs = np.array(
        [[0.5, 0.251, 0.249, 0.0], [0.5, 0.26, 0.24, 0.0], [0.5, 0.251, 0.249, 0.0]], np.float32
    )
    indices = np.array([[0, 1]] * 3, np.int32)
    other, same = [0.6, 0, 0.4, 0], [0.6, 0.4, 0, 0]
    gates = np.array([other, other, same], np.float16)
    assert near_tie_flips(gates, probs, indices).tolist() == [True, False, False]
    result = compare_routing(0, gates, probs, indices)
    assert (result.near_tie_flips, result.set_agreement) == (1, pytest.approx(1 / 3))
