"""Bytes become texts to look at, and are all there."""

import io
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ane_moe.errors import UserError
from ane_moe.redaction import documents
from ane_moe.redaction.documents import decoded, pieces


class Slow(io.BytesIO):
    """Gives a few bytes at a time, as a pipe may."""

    step = 3

    def read1(self, size=-1):
        return super().read1(min(size, self.step) if size > 0 else self.step)


@given(st.text(), st.integers(1, 5))
@settings(deadline=None)
def test_characters_cut_anywhere_come_whole(text, step):
    stream = Slow(text.encode() + b"x" * 20 * text.count("\0"))
    stream.step = step if "\0" not in text else 1 << 20
    assert "".join(decoded(stream, "f")).rstrip("x") == text.rstrip("x")


@given(st.text(alphabet="a \t\r\n\u2028é"), st.sampled_from(["line", "paragraph"]))
@settings(deadline=None)
def test_pieces_join_to_the_text(text, unit):
    found = list(chain(*pieces([text[:7], text[7:9], text[9:]], unit)))
    assert "".join(piece.text for piece in found) == text
    assert all(piece.text for piece in found) and (not found or found[-1].ends)


def test_units_are_lines_or_paragraphs_with_the_breaks_behind_them():
    text = "a\nb\r\n \t\r\nc\n\n\nd"
    assert [one.text for one in chain(*pieces([text], "line"))] == text.splitlines(keepends=True)
    assert [one.text for one in chain(*pieces([text], "paragraph"))] == [
        "a\nb\r\n \t\r\n",
        "c\n\n",
        "\nd",
    ]


def test_long_units_come_in_pieces_in_flat_memory(monkeypatch):
    monkeypatch.setattr(documents, "LONGEST_PIECE", 10)
    longest = 0
    for piece, *_ in pieces(("x" * 7 for _ in range(1000)), "line"):
        longest = max(longest, len(piece.text))
    assert longest == 10
    found = list(chain(*pieces(["x" * 25 + "\ny"], "line")))
    assert [(len(one.text), one.ends) for one in found] == [
        (10, False),
        (10, False),
        (6, True),
        (1, True),
    ]


def test_a_million_line_breaks_are_quick():
    found = pieces(["\n" * 1_000_000, " " * 1_000_000], "paragraph")
    assert sum(len(one.text) for batch in found for one in batch) == 2_000_000


def test_what_came_at_once_is_given_out_before_more_is_read():
    given = []

    def lines():
        for line in ("a\n", "b", "\nc\nd\n"):
            given.append(line)
            yield line

    found = [([one.text for one in batch], len(given)) for batch in pieces(lines(), "line")]
    assert found == [(["a\n"], 1), (["b\n", "c\n", "d\n"], 3)]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"abc\xffdef", "not UTF-8; found: byte 3"),
        (b"ab\xe2\x82", "not UTF-8; found: byte 2"),
        ("secret".encode("utf-16"), "binary, or UTF-16"),
        ("secret".encode("utf-16-le"), "binary, or UTF-16"),
        (b"\x7fELF\x02\x01" + bytes(200) + b"\xff", "binary"),
        (b"secret text " * 9 + b"\0\xff", "binary"),
    ],
)
@pytest.mark.parametrize("step", [2, 1 << 20])
def test_what_is_no_text_is_named_by_its_place_alone(data, words, step):
    stream = Slow(data)
    stream.step = step
    with pytest.raises(UserError, match="f is ") as error:
        list(decoded(stream, "f"))
    assert "secret" not in str(error.value)
    if step > 2:
        assert words in str(error.value)
