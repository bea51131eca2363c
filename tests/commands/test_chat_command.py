"""`ane-moe chat` from the command line, over numpy shards and a real tokenizer."""

import json

import pytest
import typer
from typer.testing import CliRunner

from ane_moe.commands.chat import Talk, chat
from ane_moe.errors import UserError
from ane_moe.loop.conversations import Conversations
from ane_moe.loop.dialogue import Dialogue
from ane_moe.loop.generation import GenerateOptions
from ane_moe.loop.messages import Message
from ane_moe.loop.tokenizer import load_tokenizer
from tests.letters import CHAT, letter_shards, serve_shards

CONTEXT = 64


@pytest.fixture
def out(tmp_path, monkeypatch):
    shards = letter_shards(tmp_path)
    serve_shards(monkeypatch, shards)
    return tmp_path


def run(*arguments, lines=()):
    app = typer.Typer()
    app.command()(chat)
    given = [str(argument) for argument in (*arguments, "--temperature", 0, "--max-tokens", 5)]
    return CliRunner().invoke(app, given, input="\n".join(lines))


def test_a_pipe_gets_answers_alone_and_each_turn_takes_in_what_is_new(out):
    plain = run(out, lines=["012", "34"])
    assert plain.exit_code == 0 and plain.stderr == ""
    answers = plain.stdout.splitlines()
    assert [len(answer) for answer in answers] == [5, 5]
    told = [json.loads(one) for one in run(out, "--json", lines=["012", "34"]).stdout.splitlines()]
    assert [one["content"] for one in told] == answers
    assert [one["prompt_tokens"] for one in told] == [6, 5 + 7 + 4 + 1]
    # "<012>" stays; "!" was there in place of the answer's "<".
    assert [one["cached_tokens"] for one in told] == [0, 5]
    assert told[0]["finish_reason"] == "length" and told[0]["completion_tokens"] == 5


def test_commands_change_what_is_said_and_nothing_else(out, tmp_path):
    first = run(out, lines=["012"]).stdout
    result = run(out, lines=["34", "/reset", "", "012"])
    assert result.stdout.splitlines()[1:] == first.splitlines()
    saved = tmp_path / "talk.json"
    told = run(
        out,
        "--system",
        "55",
        lines=["012", "/system 66", f"/save {saved}", "/figures", "/quit", "3"],
    )
    said = json.loads(saved.read_text())
    assert [(one["role"], one["content"]) for one in said[:2]] == [
        ("system", "66"),
        ("user", "012"),
    ]
    assert said[2] == {"role": "assistant", "content": told.stdout.strip("\n")}
    assert "numpy runtime" in told.stderr and f"3 messages in {saved}" in told.stderr
    slashed = run(out, "--json", lines=["//12"]).stdout
    assert json.loads(slashed)["prompt_tokens"] == len("</12>!")
    assert "/figures" in run(out, lines=["/help"]).stderr


@pytest.mark.parametrize(
    "lines, message",
    [
        (["/fly"], "no such command; found: /fly"),
        (["/save"], "needs the name"),
        (["0" * CONTEXT], "does not fit into the context"),
        (["/save /nowhere/at/all"], "cannot be written"),
    ],
)
def test_bad_lines_of_a_pipe_end_it(out, lines, message):
    result = run(out, lines=lines)
    assert isinstance(result.exception, UserError) and message in str(result.exception)


def dialogue_of(folder, max_tokens=4, template=CHAT):
    shards = letter_shards(folder, template)
    tokenizer = load_tokenizer(folder, shards.manifest)
    conversations = Conversations(shards)
    return Dialogue(conversations, tokenizer, GenerateOptions(max_tokens)), conversations


def said(dialogue, text):
    turn = dialogue.ask(text)
    for _ in turn.generation:
        pass
    dialogue.answered(turn.generation.result().text)
    return turn


def test_a_full_context_leaves_the_oldest_out_until_half_is_free(tmp_path):
    dialogue, _ = dialogue_of(tmp_path)
    dialogue.system = "99"
    left_out = []
    for _ in range(8):
        turn = said(dialogue, "0123")
        assert turn.prompt_tokens + 4 <= CONTEXT
        left_out.append(dialogue.left_out)
    # Prompts grow by 12: 11, 23, 35, 47, 59; the sixth would be 71, and is 23 without four turns.
    assert left_out == [0, 0, 0, 0, 0, 8, 8, 8]
    assert turn.prompt_tokens == 23 + 24
    assert dialogue.transcript[0] == Message("system", "99") and len(dialogue.messages) == 16


def test_a_message_that_does_not_fit_was_not_said(tmp_path):
    dialogue, _ = dialogue_of(tmp_path)
    said(dialogue, "0123")
    before = list(dialogue.messages)
    with pytest.raises(UserError, match="does not fit"):
        dialogue.ask("0" * CONTEXT)
    assert dialogue.messages == before and said(dialogue, "01").taken > 0


def test_without_a_template_it_is_said(tmp_path, monkeypatch):
    shards = letter_shards(tmp_path, template=None)
    serve_shards(monkeypatch, shards)
    result = run(tmp_path, lines=["012"])
    assert result.exit_code == 0 and "no chat template" in result.stderr


def test_a_terminal_shows_errors_and_goes_on(tmp_path, monkeypatch, capsys):
    dialogue, conversations = dialogue_of(tmp_path)
    lines = iter(["/fly", "0" * CONTEXT, "012"])
    monkeypatch.setattr("ane_moe.commands.chat._typed", lambda: next(lines, None) or _end())
    Talk(dialogue, conversations, in_view=True).run()
    shown = capsys.readouterr()
    assert "no such command" in shown.err and "does not fit" in shown.err
    assert len(shown.out.strip("\n")) == 4 and len(dialogue.messages) == 2


def _end():
    raise EOFError


def test_an_interrupt_keeps_what_came(tmp_path, monkeypatch, capsys):
    import os
    import signal

    dialogue, conversations = dialogue_of(tmp_path, max_tokens=30)
    shown = []

    def show(text):
        shown.append(text)
        if len(shown) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("ane_moe.commands.chat._show", show)
    Talk(dialogue, conversations, in_view=False)._line("012")
    assert dialogue.messages[1].content == "".join(shown) and len(shown) == 3
    assert said(dialogue, "34").taken > 4  # nothing in the cache was lost
