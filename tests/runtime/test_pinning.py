"""Pinned experts: all of them are the model, fewer are another one, by hand."""

import numpy as np
import pytest

from ane_moe.errors import UserError
from ane_moe.loop.figures import PinFigures
from ane_moe.loop.pinning import PinnedSession, Pinning, PinOptions
from ane_moe.loop.session import Session
from tests.runtime.numpy_shards import EXPERTS, Decoder, make_manifest, make_shards

PROMPT = [3, 8, 1, 5, 9, 2]


def shards(routing="sparse"):
    return make_shards(Decoder((None, None)), make_manifest((None, None), routing=routing))


def text(session, count=20):
    logits = [session.prefill(PROMPT).copy()]
    for _ in range(count):
        logits.append(session.decode(int(logits[-1].argmax())).copy())
    return np.stack(logits)


def test_all_experts_pinned_are_the_model_to_the_last_bit():
    pinned = PinnedSession(shards(), PinOptions(EXPERTS, 3))
    np.testing.assert_array_equal(text(pinned), text(Session(shards())))
    figures = pinned.figures.pinned
    assert figures.kept == figures.chosen > 0 and figures.selections == 1 + 19 // 3


def test_no_expert_is_called_that_is_not_pinned_until_they_are_chosen_anew():
    one = shards()
    session = PinnedSession(one, PinOptions(2))
    session.prefill(PROMPT)
    loads = len(one.cache.loads)
    for _ in range(30):
        session.decode(4)
    later = one.cache.loads[loads:]
    assert len(later) <= 2 * 2  # of two layers, where their functions for one token were missing
    assert session.figures.pinned.kept < session.figures.pinned.chosen


def test_gates_by_hand():
    figures = PinFigures(2)
    pinning = Pinning({0: 4}, 2, figures)
    pinning.hear(0, np.array([[0.1], [0.6], [0.0], [0.3], [9.0]]))  # the last is no expert's
    pinning.select({0: 5})
    gates = np.array([[0.5, 0.2, 0], [0.25, 0, 0.7], [0, 0.8, 0], [0, 0, 0.3], [0, 0, 0]])
    kept = pinning.restrict(0, gates)
    expected = np.array([[0, 0, 0], [0.75, 0, 0.7], [0, 0, 0], [0, 0, 0.3], [0, 0, 0]])
    np.testing.assert_allclose(kept, expected, atol=1e-6)
    assert (figures.chosen, figures.kept) == (6, 3)
    pinning.select({0: 5})  # by what was wished for since, not by what was allowed
    np.testing.assert_allclose(pinning.restrict(0, gates)[:, 1], [0, 0, 1, 0, 0], atol=1e-6)


def test_what_makes_no_sense_is_refused():
    for wrong in (PinOptions(0), PinOptions(2, 0)):
        with pytest.raises(UserError):
            PinnedSession(shards(), wrong)
    with pytest.raises(UserError, match="sparse"):
        PinnedSession(shards("masked"), PinOptions(2))
