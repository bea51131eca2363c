"""`ane-moe generate` from the command line, over numpy shards and a real tokenizer."""

import json

import pytest
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from ane_moe.commands.generate import generate
from ane_moe.errors import UserError
from ane_moe.loop.session import Session
from tests.early import drawn_file
from tests.letters import serve_shards
from tests.runtime.numpy_shards import VOCAB, D, Decoder, make_manifest, make_shards

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}!{% endif %}"


@pytest.fixture
def out(tmp_path, monkeypatch):
    """A folder with a tokenizer of one letter per id; loading it gives numpy shards."""
    letters = [chr(ord("0") + index) for index in range(VOCAB)]
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHAT).save_pretrained(tmp_path)
    _serve(tmp_path, monkeypatch, ("tokenizer.json",))
    return tmp_path


def _serve(folder, monkeypatch, tokenizer):
    shards = make_shards(Decoder((None,)), make_manifest((None,)))
    object.__setattr__(shards.manifest, "tokenizer", tokenizer)
    object.__setattr__(shards.manifest, "tokenizer_class", "PreTrainedTokenizerFast")
    serve_shards(monkeypatch, shards)


def run(*arguments, **options):
    app = typer.Typer()
    app.command()(generate)
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


def test_text_goes_to_stdout_and_figures_that_name_the_runtime_to_stderr(out):
    result = run(out, "--prompt", "01234", "--max-tokens", 6)
    assert result.exit_code == 0
    assert len(result.stdout.strip("\n")) == 6
    assert (
        "numpy runtime" in result.stderr
        and "tok/s" in result.stderr
        and "ended by: length" in result.stderr
    )


def test_json_is_one_document_with_the_fields_that_are_promised(out):
    result = run(out, "--prompt", "01234", "--max-tokens", 6, "--json")
    document = json.loads(result.stdout)
    assert set(document) == {"prompt_ids", "ids", "text", "finish_reason", "figures"}
    assert document["prompt_ids"] == [0, 1, 2, 3, 4] and len(document["ids"]) == 6
    assert document["text"] == "".join(chr(ord("0") + identifier) for identifier in document["ids"])
    assert {
        "runtime",
        "conditions",
        "prefill_tok_s",
        "decode_tok_s",
        "calls_per_token",
        "host_ms_per_call",
    } <= set(document["figures"])


def test_a_prompt_comes_from_an_option_a_file_stdin_or_ids_alike(out, tmp_path):
    (tmp_path / "prompt.txt").write_text("01234")
    texts = {
        run(out, *source, **more).stdout
        for source, more in [
            (("--prompt", "01234"), {}),
            (("--prompt-file", tmp_path / "prompt.txt"), {}),
            ((), {"input": "01234"}),
            (("--prompt-ids", "0,1, 2,3,4"), {}),
        ]
    }
    assert len(texts) == 1


def test_chat_wraps_the_prompt_in_the_template(out):
    plain = json.loads(run(out, "--prompt", "<user>012!", "--json").stdout)
    chat = json.loads(run(out, "--prompt", "012", "--chat", "--json").stdout)
    assert chat["prompt_ids"] == plain["prompt_ids"]


def test_without_a_tokenizer_ids_go_in_and_come_out(tmp_path, monkeypatch):
    _serve(tmp_path, monkeypatch, ())
    result = run(tmp_path, "--prompt-ids", "1,2,3", "--max-tokens", 4)
    assert len([int(part) for part in result.stdout.split()]) == 4
    assert isinstance(run(tmp_path, "--prompt", "x").exception, UserError)


def test_an_interrupt_ends_with_the_figures_so_far(out, monkeypatch):
    calls, original = [], Session.decode

    def decode(self, identifier):
        calls.append(identifier)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, identifier)

    monkeypatch.setattr(Session, "decode", decode)
    document = json.loads(run(out, "--prompt", "01234", "--json").stdout)
    assert document["finish_reason"] == "interrupted" and len(document["ids"]) == 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt", "0", "--prompt-ids", "1"], "more than once"),
        (["--prompt-ids", "1,x"], "not a list of ids"),
        (["--prompt-file", "/nowhere/at/all"], "cannot be read"),
        (["--prompt-ids", "41"], "outside the vocabulary"),
        (["--prompt", ""], "no tokens"),
        (["--prompt", "0", "--top-p", "2"], "top-p"),
    ],
)
def test_bad_input_is_one_clear_error(out, arguments, message):
    result = run(out, *arguments)
    assert isinstance(result.exception, UserError) and message in str(result.exception)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--self-speculate", 3, "--ahead", 2],
            "--ahead would do nothing; found: with --self-speculate",
        ),
        (["--ahead", 3], "--ahead would do nothing; found: guesses by: none; give --predictor, or"),
        (["--ahead-if-it-pays"], "--ahead-if-it-pays would do nothing"),
        (
            ["--predictor", "static", "--contention", 0.2],
            "give --ahead-if-it-pays, or leave it out",
        ),
        (
            ["--roster", 2, "--adapters", "a.npz"],
            "--adapters would do nothing; found: with --roster",
        ),
        (
            ["--predictor", "router", "--adapters", "a.npz"],
            "nothing; found: guesses by: router; give",
        ),
        (["--exit-layer", 0], "give --self-speculate, or leave it out"),
        (["--pin-every", 8], "give --pin-experts, or leave it out"),
        (["--roster", 2, "--self-speculate", 2], "more than one way"),
        (["--tau", 0.1], "--tau would do nothing; found: guesses by: none; give --roster"),
        (["--predictor", "static"], "there are no experts to load ahead"),
    ],
)
def test_an_option_that_would_do_nothing_is_one_clear_error(out, tmp_path, arguments, message):
    file = drawn_file(tmp_path / "a.npz", D, (0,), 1)
    given = [file if one == "a.npz" else one for one in arguments]
    result = run(out, "--prompt", "0", *given)
    assert isinstance(result.exception, UserError) and message in str(result.exception)


def test_a_prompt_file_that_is_not_text_is_refused(out, tmp_path):
    (tmp_path / "prompt.bin").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in str(run(out, "--prompt-file", tmp_path / "prompt.bin").exception)
