"""`ane-moe redact` and `unredact` from the command line, over a scorer that finds runs of digits."""

import json
import stat

import pytest
import typer
from typer.testing import CliRunner

from ane_moe.commands.redact import redact
from ane_moe.commands.unredact import unredact
from ane_moe.errors import UserError
from ane_moe.redaction.redactor import Redactor
from tests.redaction.scorers import Digits, byte_tokenizer

TEXT = "call 555 or 666,\r\nthen 555\tש e\u0301 🙂\n\nat 7."
HIDDEN = "call [ACCOUNT_NUMBER] or [ACCOUNT_NUMBER],\r\nthen [ACCOUNT_NUMBER]\tש e\u0301 🙂\n\nat [ACCOUNT_NUMBER]."
NUMBERED = "call [ACCOUNT_NUMBER_1] or [ACCOUNT_NUMBER_2],\r\nthen [ACCOUNT_NUMBER_1]\tש e\u0301 🙂\n\nat [ACCOUNT_NUMBER_3]."


@pytest.fixture(autouse=True)
def _digits(monkeypatch):
    tokenizer = byte_tokenizer()

    def opened(folder, labels=None, biases=None, runtime="auto"):
        return Redactor(Digits(tokenizer), tokenizer, labels)

    monkeypatch.setattr("ane_moe.redaction.redactor.open_redactor", opened)


def run(command, *arguments, **options):
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_bytes(TEXT.encode())
    return path


def test_a_text_comes_from_an_argument_a_file_or_stdin_byte_for_byte(file):
    assert run(redact, "out", TEXT).stdout_bytes == HIDDEN.encode() + b"\n"
    assert run(redact, "out", "--file", file).stdout_bytes == HIDDEN.encode()
    assert run(redact, "out", input=TEXT.encode()).stdout_bytes == HIDDEN.encode()
    by_line = run(redact, "out", "--unit", "line", input=TEXT.encode())
    assert by_line.stdout_bytes == HIDDEN.encode()


def test_a_placeholder_of_the_users_and_labels(file):
    assert run(redact, "out", "--placeholder", "X", "a 12 b").stdout == "a X b\n"
    assert run(redact, "out", "--placeholder", "", "a 12 b").stdout == "a  b\n"
    assert run(redact, "out", "--labels", "email,phone", "a 12 b").stdout == "a 12 b\n"
    assert run(redact, "out", "--labels", "account_number", "a 12 b").stdout != "a 12 b\n"


def test_a_mapping_restores_the_text_and_is_for_its_owner_alone(file, tmp_path):
    table, hidden = tmp_path / "table.json", tmp_path / "hidden.txt"
    result = run(redact, "out", "--file", file, "--mapping", table)
    assert result.stdout_bytes == NUMBERED.encode()
    assert stat.S_IMODE(table.stat().st_mode) == 0o600
    hidden.write_bytes(result.stdout_bytes)
    back = run(unredact, "--mapping", table, "--file", hidden)
    assert back.stdout_bytes == TEXT.encode()
    assert run(unredact, "--mapping", table, input=NUMBERED.encode()).stdout_bytes == TEXT.encode()
    edited = run(unredact, "--mapping", table, "Dear [ACCOUNT_NUMBER_2], [ACCOUNT_NUMBER_9]!")
    assert edited.stdout == "Dear 666, [ACCOUNT_NUMBER_9]!\n"


def test_files_are_written_beside_and_left_as_they_are(file, tmp_path):
    other = tmp_path / "other"
    other.write_text("no 1")
    table = tmp_path / "table.json"
    result = run(redact, "out", "--beside", "--mapping", table, "--file", file, other)
    assert result.exit_code == 0 and result.stdout == ""
    assert file.read_bytes() == TEXT.encode() and other.read_text() == "no 1"
    hidden = tmp_path / "notes.redacted.txt"
    assert hidden.read_bytes() == NUMBERED.encode()
    assert (tmp_path / "other.redacted").read_text() == "no [ACCOUNT_NUMBER_4]"
    run(unredact, "--mapping", table, "--beside", "--file", hidden)
    assert (tmp_path / "notes.redacted.restored.txt").read_bytes() == TEXT.encode()
    assert not list(tmp_path.glob(".writing*"))


def test_nothing_is_written_beside_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "half.txt"
    path.write_bytes(b"line 5\n\n" * 10_000 + b"\xff")
    result = run(redact, "out", "--beside", "--file", path)
    assert isinstance(result.exception, UserError)
    assert [one.name for one in tmp_path.iterdir()] == ["half.txt"]


def test_json_is_one_document(file):
    for option in (("--json",), ("--format", "json")):
        result = run(redact, "out", "--numbered", *option, "--file", file)
        document = json.loads(result.stdout_bytes)
        assert set(document) == {"source", "spans", "counts", "text"}
        assert document["text"] == NUMBERED and document["counts"] == {"account_number": 4}
        found = [TEXT[one["start"] : one["end"]] for one in document["spans"]]
        assert found == ["555", "666", "555", "7"]
        assert [one["placeholder"] for one in document["spans"]][2] == "[ACCOUNT_NUMBER_1]"
        assert all(0 < one["score"] <= 1 for one in document["spans"])


def test_spans_are_an_object_a_line(file):
    lines = run(redact, "out", "--format", "spans", "--file", file).stdout.splitlines()
    assert [TEXT[one["start"] : one["end"]] for one in map(json.loads, lines)] == [
        "555",
        "666",
        "555",
        "7",
    ]


def test_bio_is_a_label_for_every_token():
    rows = [
        line.split("\t")
        for line in run(redact, "out", "--scheme", "bio", "a 12").stdout.splitlines()
    ]
    assert [row[2] for row in rows] == ["O", "O", "B-account_number", "I-account_number"]
    assert ["a 12"[int(a) : int(b)] for a, b, *_ in rows] == [json.loads(row[3]) for row in rows]
    full = run(redact, "out", "--scheme", "bioes", "a 12").stdout
    assert "E-account_number" in full


def test_check_says_where_and_exits_with_1(file):
    result = run(redact, "out", "--check", "--file", file)
    assert result.exit_code == 1
    places = [line.split(": ")[0] for line in result.stdout.splitlines()]
    assert places == [f"{file}:{place}" for place in ("1:6", "1:13", "2:6", "4:4")]
    assert "555" not in result.output and "666" not in result.output
    clean = run(redact, "out", "--check", "nothing here")
    assert clean.exit_code == 0 and clean.stdout == ""


def test_html_is_one_page_that_shows_any_text():
    result = run(redact, "out", "--format", "html", "<script>1</script>\0\x1b&")
    page = result.stdout
    assert page.startswith("<!doctype html>") and page.endswith("</html>\n")
    assert "<script" not in page and "http" not in page
    assert "&lt;script&gt;<mark" in page and "&lt;/script&gt;\u2400\u241b&amp;" in page


def test_a_terminal_shows_the_original_in_colour_and_is_not_driven_by_it():
    from ane_moe.redaction.documents import Piece
    from ane_moe.redaction.placeholders import Plain, Template
    from ane_moe.redaction.redactor import marked, open_redactor
    from ane_moe.report.redaction_forms import view_form

    found = open_redactor(None)
    passages = (
        marked(one, Plain(Template())) for one in found.passages([[Piece("a 12\x1b[2J\r\n", True)]])
    )
    (view,) = view_form(passages, found.labels)
    assert "\x1b" not in view.plain and view.plain.startswith("a 12 account_number 100%")
    assert next(view.plain[one.start : one.end] for one in view.spans) == "12"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a 1", "b 2"], "more than one text"),
        (["--labels", "nose", "x"], "unknown label; found: nose"),
        (["--format", "pdf", "x"], "unknown --format"),
        (["--preset", "best", "x"], "unknown --preset"),
        (["--scheme", "iob3", "x"], "unknown --scheme"),
        (["--unit", "word", "x"], "unknown --unit"),
        (["--file", "/nowhere/at/all"], "cannot be read"),
        (["--file", "/"], "cannot be read"),
        (["--numbered", "--placeholder", "X", "x"], "can be undone"),
        (["--mapping", "/nowhere/table", "x 1"], "cannot be written"),
    ],
)
def test_bad_input_is_one_clear_error(arguments, message):
    result = run(redact, "out", *arguments)
    assert isinstance(result.exception, UserError) and message in str(result.exception)
    assert "b 2" not in str(result.exception)


@pytest.mark.parametrize(
    "data", [b"secret 1 \xff", b"secret\0\0\0\0\0\0\0\xff", "secret".encode("utf-16")]
)
def test_bytes_that_are_no_text_are_one_clear_error_without_them(data):
    result = run(redact, "out", input=data)
    assert isinstance(result.exception, UserError) and str(result.exception).startswith("stdin is ")
    assert "secret" not in str(result.exception)
