"""What placeholders stand for comes back, whatever the text holds."""

import json
import stat

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ane_moe.errors import UserError
from ane_moe.redaction.placeholders import (
    LOOKALIKE,
    Mapping,
    Numbered,
    Plain,
    Template,
    read_mapping,
    restored,
    restored_stream,
    write_mapping,
)
from ane_moe.redaction.redactor import Passage, marked
from ane_moe.redaction.spans import Span

LABELS = ("private_email", "secret", "private_person")
# Texts that are hard to come back from: full of what looks like placeholders, or parts of them.
HARD = st.lists(
    st.one_of(
        st.text(max_size=5),
        st.sampled_from(["[", "]", "[EMAIL_", "_1]", "[EMAIL_1]", "[SECRET_1]", "[EMAIL_2]", "1]"]),
        st.sampled_from(["[PLACEHOLDER_1]", "[PLACEHOLDER_2]", "[[", "[EMAIL_01]", "[email_1]"]),
        st.sampled_from(["\r\n", "\t", "\0", "e\u0301", "👩‍👩‍👧", "שלום", "a@b.c", " "]),
    ),
    max_size=12,
).map("".join)
TEMPLATES = st.sampled_from(
    ["[{LABEL}]", "<{LABEL}>", "«pii:{LABEL}:»", "({LABEL}9)", "$_{LABEL}%"]
)


@st.composite
def passages(draw):
    """Texts one after another, each with spans that are in order and apart."""
    made = []
    for text in draw(st.lists(HARD, min_size=1, max_size=5)):
        places = draw(st.lists(st.integers(0, len(text)), max_size=8, unique=True))
        pairs = zip(sorted(places)[::2], sorted(places)[1::2], strict=False)
        spans = (Span(*pair, draw(st.sampled_from(LABELS)), 0.5) for pair in pairs)
        made.append(Passage(text, 0, (), tuple(spans)))
    return made


@given(passages(), TEMPLATES, st.data())
@settings(deadline=None)
def test_a_numbered_text_comes_back_exactly(texts, template, data):
    numbered = Numbered(Template(template))
    found = [marked(one, numbered) for one in texts]
    whole = "".join(one.redacted for one in found)
    table = Mapping(numbered.template, numbered.table)
    assert restored(whole, table) == "".join(one.text for one in texts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert "".join(restored_stream(pieces, table)) == restored(whole, table)


@given(passages(), TEMPLATES, st.booleans())
@example([Passage("a [EMAIL_1] b", 0, (), ())], "[{LABEL}]", True)
@settings(deadline=None)
def test_what_lies_outside_the_spans_is_unchanged(texts, template, numbered):
    places = (Numbered if numbered else Plain)(Template(template))
    for text in texts:
        found, rest, last = marked(text, places), [], 0
        for span in found.spans:
            assert span in text.spans or span.label == LOOKALIKE
            rest.append(text.text[last : span.start])
            last = span.end
        pieces = [*rest, text.text[last:]]
        given_out = found.redacted
        for piece, placeholder in zip(pieces, (*found.placeholders, ""), strict=True):
            assert given_out.startswith(piece + placeholder)
            given_out = given_out[len(piece + placeholder) :]
        assert given_out == ""


@given(passages())
@settings(deadline=None)
def test_a_text_known_as_a_whole_keeps_what_looks_like_placeholders(texts):
    assert marked(texts[0], Numbered(Template())).spans == texts[0].spans


def test_the_same_text_gets_the_same_number_and_another_another():
    numbered = Numbered(Template())
    spans = tuple(Span(at, at + 1, "private_email", 1.0) for at in (0, 1, 2))
    found = marked(Passage("aba", 0, (), spans), numbered)
    assert found.redacted == "[EMAIL_1][EMAIL_2][EMAIL_1]"
    assert numbered.table == {"[EMAIL_1]": "a", "[EMAIL_2]": "b"}


def test_a_number_that_the_text_holds_is_not_given_out():
    numbered = Numbered(Template())
    passage = Passage("[EMAIL_1] a", 0, (), (Span(10, 11, "private_email", 1.0),))
    assert marked(passage, numbered).redacted == "[EMAIL_1] [EMAIL_2]"


def test_what_looks_like_an_earlier_placeholder_is_replaced_too():
    numbered = Numbered(Template())
    marked(Passage("a", 0, (), (Span(0, 1, "private_email", 1.0),)), numbered)
    later = marked(Passage("see [EMAIL_1]", 0, (), ()), numbered)
    assert later.redacted == "see [PLACEHOLDER_1]"
    assert numbered.table["[PLACEHOLDER_1]"] == "[EMAIL_1]"


def test_an_ordinary_log_is_not_remembered():
    numbered = Numbered(Template())
    for second in range(1000):
        numbered.lookalikes(f"[2026-01-01 00:00:{second}] [INFO] [worker-{second}] started\n")
    assert not numbered._kept and not numbered.table


@pytest.mark.parametrize(
    "text",
    ["[x]", "{LABEL}", "[{LABEL}[", "a{LABEL}b", "[ {LABEL}]", "[[{LABEL}]", "[{LABEL}|]]", "[]"],
)
def test_a_template_that_cannot_be_undone_is_refused_for_numbers_alone(text):
    with pytest.raises(UserError, match="can be undone"):
        Numbered(Template(text))
    assert Plain(Template(text)).of(Span(0, 1, "private_email", 1.0), "a") == text.replace(
        "{LABEL}", "EMAIL"
    )


def test_the_mapping_is_for_its_owner_alone(tmp_path):
    numbered = Numbered(Template())
    numbered.of(Span(0, 1, "secret", 1.0), "\0\r\n€")
    path = tmp_path / "map.json"
    path.write_text("older")
    path.chmod(0o644)
    write_mapping(path, numbered)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_mapping(path) == Mapping(Template(), {"[SECRET_1]": "\0\r\n€"})
    assert [one.name for one in tmp_path.iterdir()] == ["map.json"]


@pytest.mark.parametrize(
    "document",
    [
        "private",
        [],
        {},
        {"format": 2, "placeholder": "[{LABEL}]", "table": {}},
        {"format": 1, "placeholder": "x", "table": {}},
        {"format": 1, "placeholder": "[{LABEL}]", "table": {"private": "x"}},
        {"format": 1, "placeholder": "[{LABEL}]", "table": {"[A_1]": 1}},
        {"format": 1, "placeholder": 3, "table": {}},
    ],
)
def test_what_is_no_mapping_is_refused_without_a_word_of_it(tmp_path, document):
    path = tmp_path / "map.json"
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match="is no mapping") as error:
        read_mapping(path)
    assert "private" not in str(error.value)
