"""Spans of labels are characters of the original."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ane_moe.errors import UserError
from ane_moe.redaction.spans import as_bio, find_kinds, kinds_of, probabilities, spans_of
from tests.redaction.scorers import PUBLISHED, byte_tokenizer

TOKENIZER = byte_tokenizer()


def spans(text, *names):
    offsets = TOKENIZER.encode_with_offsets(text)[1]
    assert len(offsets) == len(names)
    found = spans_of(text, offsets, names, np.full(len(names), 0.5))
    return [(text[one.start : one.end], one.label, one.score) for one in found]


def test_a_span_is_what_its_tokens_cover_without_the_space_before_it():
    names = ("O", "B-p", "I-p", "E-p", "O")
    assert spans("x abc.", "O", "B-p", "I-p", "E-p", "O") == [("abc", "p", 0.5)]
    assert spans("x abc\t", *names) == [("abc", "p", 0.5)]


def test_tokens_of_a_part_of_a_character_stand_for_all_of_it():
    assert spans("🙂", "B-p", "I-p", "I-p", "E-p") == [("🙂", "p", 0.5)]
    assert spans("🙂", "O", "S-p", "O", "O") == [("🙂", "p", 0.5)]


def test_a_character_that_two_spans_share_belongs_to_the_first():
    assert spans("🙂", "S-p", "S-q", "S-p", "O") == [("🙂", "p", 0.5)]
    assert spans("🙂x", "O", "O", "S-p", "B-q", "E-q") == [("🙂", "p", 0.5), ("x", "q", 0.5)]


def test_spans_of_white_space_alone_are_none():
    assert spans("x \r\n", "O", "B-p", "I-p", "E-p") == []


def test_scores_are_mean_probabilities_of_the_labels():
    scores = np.log(np.array([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]]))
    assert probabilities(scores + 7, np.array([0, 2])) == pytest.approx([0.7, 0.5])


def test_kinds_go_by_their_full_and_short_names():
    assert kinds_of(PUBLISHED)[:2] == ["account_number", "private_address"]
    assert find_kinds(["email", "secret"], PUBLISHED) == {"private_email", "secret"}
    assert find_kinds(["private_email"], PUBLISHED) == {"private_email"}
    with pytest.raises(UserError, match="found: nose; this model has account_number, address"):
        find_kinds(["email", "nose"], PUBLISHED)


def test_bio_is_bioes_without_ends():
    names = ["O", "B-p", "I-p", "E-p", "S-q", "S-q", "B-q", "E-q"]
    assert as_bio(names) == ["O", "B-p", "I-p", "I-p", "B-q", "B-q", "B-q", "I-q"]


@given(st.text())
@settings(deadline=None)
def test_offsets_are_characters_of_any_text(text):
    ids, offsets = TOKENIZER.encode_with_offsets(text)
    assert ids == TOKENIZER.encode(text)
    assert all(0 <= start < end <= len(text) for start, end in offsets)
    assert {place for start, end in offsets for place in range(start, end)} == set(range(len(text)))
