"""The decoder against a search of all label sequences."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import OpenAIPrivacyFilterConfig

from ane_moe.errors import UserError
from ane_moe.redaction.viterbi import CALIBRATION, PRESETS, Biases, Decoder, read_biases

TWO_KINDS = ["O", "B-a", "I-a", "E-a", "S-a", "S-b", "B-b", "E-b", "I-b"]
PUBLISHED = list(OpenAIPrivacyFilterConfig().id2label.values())
SIX = Biases(0.3, -0.7, 0.9, -0.4, 0.6, -1.1)


def is_legal(names):
    """Spelt by the grammar itself: O, S, or B I* E of one kind, and nothing open at the end."""
    kind = None
    for name in names:
        tag, own = name[0], name[2:]
        if (tag in "IE" and own == kind) != (kind is not None) or (kind is None and tag in "IE"):
            return False
        kind = own if tag in "BI" else None
    return kind is None


def bias_between(a, b, biases):
    pairs = {
        "OO": biases.background_stay,
        "OB": biases.background_to_start,
        "OS": biases.background_to_start,
        "BI": biases.inside_to_continue,
        "II": biases.inside_to_continue,
        "BE": biases.inside_to_end,
        "IE": biases.inside_to_end,
    }
    after_end = biases.end_to_background if b[0] == "O" else biases.end_to_start
    return pairs.get(a[0] + b[0], after_end)


def total(scores, path, names, biases):
    moves = sum(bias_between(a, b, biases) for a, b in itertools.pairwise(names))
    return scores[np.arange(len(path)), path].sum() + moves


def best_of_all(scores, labels, biases):
    """The score of the best legal sequence, by trying every sequence there is."""
    best = -np.inf
    for path in itertools.product(range(len(labels)), repeat=len(scores)):
        names = [labels[one] for one in path]
        if is_legal(names):
            best = max(best, total(scores, np.array(path), names, biases))
    return best


@pytest.mark.parametrize("biases", [Biases(), SIX, *PRESETS.values()])
@pytest.mark.parametrize("length", range(1, 5))
def test_equals_the_search_of_all_sequences(length, biases):
    for seed in range(4):
        scores = np.random.default_rng(seed).normal(size=(length, len(TWO_KINDS))) * 2
        path = Decoder(TWO_KINDS, biases).decode(scores)
        names = [TWO_KINDS[one] for one in path]
        assert is_legal(names)
        assert total(scores, path, names, biases) == pytest.approx(
            best_of_all(scores, TWO_KINDS, biases)
        )


@pytest.mark.parametrize("length", [5, 6])
@pytest.mark.parametrize("biases", [Biases(), SIX])
def test_equals_the_search_of_all_sequences_of_five_and_six_tokens(length, biases):
    labels = ["O", "B-a", "I-a", "E-a", "S-a"]
    for seed in range(3):
        scores = np.random.default_rng(seed).normal(size=(length, 5)) * 2
        path = Decoder(labels, biases).decode(scores)
        names = [labels[one] for one in path]
        assert is_legal(names)
        assert total(scores, path, names, biases) == pytest.approx(
            best_of_all(scores, labels, biases)
        )


@given(seed=st.integers(0, 2**32 - 1), length=st.integers(0, 60), spread=st.floats(0, 50))
@settings(deadline=None)
def test_no_scores_give_an_illegal_sequence(seed, length, spread):
    scores = np.random.default_rng(seed).normal(size=(length, len(PUBLISHED))) * spread
    path = Decoder(PUBLISHED, PRESETS["recall"]).decode(scores.astype(np.float32))
    assert len(path) == length and is_legal([PUBLISHED[one] for one in path])


def test_the_labels_that_score_best_are_kept_where_they_are_legal():
    wanted = ["O", "B-a", "I-a", "E-a", "S-b", "O", "B-b", "E-b"]
    scores = np.array([[float(label == one) for label in TWO_KINDS] for one in wanted])
    assert [TWO_KINDS[one] for one in Decoder(TWO_KINDS).decode(scores)] == wanted


def test_presets_move_spans_the_way_they_say():
    scores = np.random.default_rng(0).normal(size=(4000, len(TWO_KINDS)))
    outside = {
        name: (Decoder(TWO_KINDS, biases).decode(scores) == 0).mean()
        for name, biases in PRESETS.items()
    }
    assert outside["recall"] < outside["default"] < outside["precision"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_no_numbers_are_refused(value):
    scores = np.zeros((3, len(TWO_KINDS)))
    scores[1, 2] = value
    with pytest.raises(UserError, match="not finite"):
        Decoder(TWO_KINDS).decode(scores)


@pytest.mark.parametrize(
    "labels", [[], ["B-a", "I-a", "E-a", "S-a"], ["O", "B-a", "I-a"], ["O", "O"], ["O", "x"]]
)
def test_labels_of_another_scheme_are_refused(labels):
    with pytest.raises(UserError, match="not BIOES"):
        Decoder(labels)


def test_the_models_own_biases_are_read(tmp_path):
    assert read_biases(tmp_path) == Biases()
    names = [f"transition_bias_{name}" for name in vars(SIX)]
    given = dict(zip(names, vars(SIX).values(), strict=True))
    path = tmp_path / CALIBRATION
    path.write_text(json.dumps({"operating_points": {"default": {"biases": given}}}))
    assert read_biases(tmp_path) == SIX
    path.write_text("{}")
    with pytest.raises(UserError, match="no biases"):
        read_biases(tmp_path)
