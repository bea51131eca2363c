"""From text to redacted text: what is outside the spans stays, whatever the text is."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ane_moe import redact
from ane_moe.errors import UserError
from ane_moe.redaction import documents, redactor
from ane_moe.redaction.documents import pieces
from ane_moe.redaction.placeholders import Mapping, Template, restored
from ane_moe.redaction.redactor import Redactor
from tests.redaction.scorers import Banded, Digits, HuggingFace, byte_tokenizer, tiny_model

# Anything in Unicode, and what text is really made of.
HARD = [
    "a",
    "B",
    "9",
    " ",
    "\t",
    "\n",
    "\r\n",
    "\0",
    "\ufeff",
    "e\u0301",
    "é",
    "👩\u200d👩\u200d👧",
]
HARD += ["שלום", "مرحبا", "\u202e", "日本", "[EMAIL_1]", "\x1b[31m", "\u2028", "@", ".", "🙂"]
TEXTS = st.one_of(st.text(), st.lists(st.sampled_from(HARD)).map("".join))


@pytest.fixture(scope="module")
def found():
    """A redactor whose spans are anywhere: scores of its model mean nothing."""
    return Redactor(Banded(), byte_tokenizer())


@given(TEXTS)
@settings(deadline=None)
def test_every_byte_outside_the_spans_is_unchanged(found, text):
    result = redact(found, text, placeholder="\ue000")
    edges = [0, *itertools.chain.from_iterable((one.start, one.end) for one in result.spans)]
    assert edges == sorted(edges) and (len(edges) == 1 or edges[-1] <= len(text))
    outside = [text[a:b] for a, b in zip(edges[::2], [*edges[1::2], len(text)], strict=True)]
    assert result.text.encode() == "\ue000".join(outside).encode()
    assert all(text[one.start : one.end].strip() for one in result.spans)


@given(TEXTS)
@settings(deadline=None)
def test_any_text_comes_back_from_its_numbered_placeholders(found, text):
    result = redact(found, text, numbered=True)
    assert restored(result.text, Mapping(Template(), result.table)) == text


@given(st.lists(TEXTS), st.sampled_from(["line", "paragraph"]))
@settings(deadline=None)
def test_passages_of_a_document_are_its_text(found, texts, unit):
    passages = list(found.passages(pieces(texts, unit)))
    assert "".join(one.text for one in passages) == "".join(texts)
    places = itertools.accumulate((len(one.text) for one in passages), initial=0)
    assert [one.at for one in passages] == list(places)[:-1]


@given(st.text(alphabet="abc \n", min_size=200, max_size=900))
@settings(deadline=None, max_examples=40)
def test_a_long_unit_is_looked_at_in_pieces_that_join(found, text):
    text = text.replace("\n", " ")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "LONGEST_PIECE", 60)
        patch.setattr(redactor, "MARGIN", 25)
        passages = list(found.passages(pieces([text], "line")))
    assert "".join(one.text for one in passages) == text and len(passages) > 1
    for one in passages:
        assert all(0 <= span.start < span.end <= len(one.text) for span in one.spans)
        assert all(a.end <= b.start for a, b in itertools.pairwise(one.spans))


def test_spans_across_the_cuts_of_a_long_unit_are_found_whole(monkeypatch):
    tokenizer = byte_tokenizer()
    found = Redactor(Digits(tokenizer), tokenizer)
    text = " ".join(f"{'a' * (one % 7)} {10**one % 10**9 + one}" for one in range(200))
    whole = found.find(text).spans
    monkeypatch.setattr(documents, "LONGEST_PIECE", 100)
    monkeypatch.setattr(redactor, "MARGIN", 30)
    passages = list(found.passages(pieces([text], "line")))
    moved = [
        (one.at + span.start, one.at + span.end, span.label)
        for one in passages
        for span in one.spans
    ]
    assert len(passages) > 10
    assert moved == [(span.start, span.end, span.label) for span in whole] and len(moved) == 200


def test_a_span_longer_than_a_piece_is_covered(monkeypatch):
    tokenizer = byte_tokenizer()
    found = Redactor(Digits(tokenizer), tokenizer)
    monkeypatch.setattr(documents, "LONGEST_PIECE", 100)
    monkeypatch.setattr(redactor, "MARGIN", 30)
    text = "a " + "7" * 1000 + " b"
    passages = list(found.passages(pieces([text], "line")))
    hidden = {
        one.at + place
        for one in passages
        for span in one.spans
        for place in range(span.start, span.end)
    }
    assert hidden == set(range(2, 1002))


def test_spans_are_those_of_hugging_faces_own_labels():
    """Against transformers' model and a reading of its labels made here."""
    tokenizer, scorer = byte_tokenizer(), HuggingFace(tiny_model(), 4000)
    text = "Naïve résumé — 100 % of it 🙂.\r\n" * 20
    encoded = tokenizer.loaded(text, return_offsets_mapping=True)
    result = redact(Redactor(scorer, tokenizer), text)
    path = Redactor(scorer, tokenizer)._decoder.decode(scorer.whole(encoded["input_ids"]))
    names = [scorer.labels[one] for one in path]
    numbers = itertools.accumulate(name[0] in "BSO" for name in names)
    rows_of = zip(numbers, names, encoded["offset_mapping"], strict=True)
    grouped = itertools.groupby(rows_of, key=lambda row: row[0])
    expected, last = [], 0
    for _, rows in grouped:
        rows = list(rows)
        if rows[0][1] == "O":
            continue
        start, end = max(last, rows[0][2][0]), max(row[2][1] for row in rows)
        piece = text[start:end]
        start, end = start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip())
        if start < end:
            expected.append((start, end, rows[0][1][2:]))
            last = end
    assert [(one.start, one.end, one.label) for one in result.spans] == expected
    assert len(expected) > 10


def test_windows_that_are_too_short_are_noticed(found):
    short = Redactor(Banded(lengths=(16,), band=16), byte_tokenizer())
    redact(short, "a short text")
    assert not short.approximate
    redact(short, "a text of more than 16 tokens" * 9)
    assert short.approximate
    redact(found, "a text of more than 64 tokens" * 9)
    assert not found.approximate


def test_other_labels_are_left_alone(found):
    text = "some text that is long enough for spans of several labels " * 9
    every = redact(found, text)
    some = redact(Redactor(Banded(), byte_tokenizer(), ["email", "private_url"]), text)
    wanted = {"private_email", "private_url"}
    assert {one.label for one in every.spans} > wanted
    assert some.spans == tuple(one for one in every.spans if one.label in wanted)


@pytest.mark.parametrize("text", ["", " ", "\n\r\n\t"])
def test_nothing_is_found_in_nothing(found, text):
    assert redact(found, text).text == text


def test_half_a_character_is_refused_without_a_word_of_the_text(found):
    with pytest.raises(UserError, match="character 6") as error:
        redact(found, "secret\ud800")
    assert "secret" not in str(error.value)


def test_an_unknown_label_is_refused():
    with pytest.raises(UserError, match="unknown label; found: nose"):
        Redactor(Banded(), byte_tokenizer(), ["nose"])
