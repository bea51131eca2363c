"""Conversions whose tokenizer Hugging Face reads otherwise without config.json: by every
command."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from ane_moe.cli import main
from ane_moe.emit.coreml.package import sha256
from ane_moe.manifest import read_manifest
from ane_moe.report.html import render_html
from ane_moe.report.report_data import gather
from ane_moe.routing.recorder import record
from ane_moe.verification.verify import verify
from tests.tokenizer_forms import mixtral_settings, tokenizer_checkpoint
from tests.verification.tiny import tiny_checkpoint, tiny_conversion

TEXT = "go hello <s>[INST] the year 2024</s> again"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_checkpoint("mixtral", folder, vocab_size=448, max_position_embeddings=128)
    return tokenizer_checkpoint(folder, "mixtral", "metaspace tokenizer.json", mixtral_settings())


@pytest.fixture(scope="module")
def original(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)


@pytest.fixture(scope="module")
def conversion(checkpoint, tmp_path_factory):
    return tiny_conversion(checkpoint, tmp_path_factory.mktemp("conversion") / "out", golden=True)


@pytest.fixture
def own(conversion, tmp_path):
    """A conversion to spoil."""
    return shutil.copytree(conversion, tmp_path / "own")


def command(capsys, *arguments):
    """Exit code and stdout."""
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    return ended.value.code or 0, capsys.readouterr().out


def change_manifest(folder, **changes):
    path = folder / "runtime_meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def as_it_used_to_be(folder, checkpoint):
    """The form of older conversions: the checkpoint's files, no class, no record."""
    names = ("tokenizer.json", "tokenizer_config.json")
    (folder / "tokenizer_record.json").unlink()
    files = dict(read_manifest(folder).files)
    del files["tokenizer_record.json"]
    for name in names:
        shutil.copy(checkpoint / name, folder)
        files[name] = sha256(folder / name)
    change_manifest(
        folder, files=files, tokenizer=names, tokenizer_class=None, tokenizer_record=None
    )


def spoil(folder, edit):
    """Change tokenizer.json, and the sha256 that is kept of it."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    change_manifest(folder, files=read_manifest(folder).files | {"tokenizer.json": sha256(path)})


def no_prefix(content):
    content["pre_tokenizer"]["prepend_scheme"] = "always"


def no_added_token(content):
    del content["added_tokens"][-1]


def no_merge(content):
    content["model"]["merges"] = content["model"]["merges"][:10]


def unreadable(content):
    content["model"]["type"] = "none of them"


def test_generate_gives_the_model_the_ids_of_its_own_tokenizer(conversion, original, capsys):
    prompt = ["generate", conversion, "--prompt", TEXT, "--max-tokens", 1, "--json"]
    code, plain = command(capsys, *prompt)
    assert code == 0 and json.loads(plain)["prompt_ids"] == original(TEXT)["input_ids"]
    code, chat = command(capsys, *prompt, "--chat")
    messages = [{"role": "user", "content": TEXT}]
    assert code == 0 and json.loads(chat)["prompt_ids"] == original.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )


def test_trace_runs_the_same_tokens_through_both(conversion, checkpoint, original, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    for source in (conversion, checkpoint):
        found = record(source, tmp_path / "text.txt", runtime="reference")
        assert found.tokens.tolist() == original(TEXT)["input_ids"]


def test_verify_compares_the_ids_that_were_recorded(conversion, checkpoint, capsys):
    code, out = command(capsys, "verify", conversion, "--json")
    document = json.loads(out)
    assert code == 0 and document["tokenizer"]["passed"] and document["tokenizer_skipped"] is None
    assert "the checkpoint's ids for all of" in command(capsys, "verify", conversion)[1]
    assert document["tokenizer"]["against"] == "record" and document["tokenizer"]["texts"] > 20
    assert verify(conversion, checkpoint=checkpoint).tokenizer.against == "checkpoint"


@pytest.mark.parametrize("edit", [no_prefix, no_added_token, no_merge, unreadable])
def test_a_tokenizer_that_was_changed_fails_a_gate(edit, own, capsys):
    spoil(own, edit)
    code, out = command(capsys, "verify", own)
    assert code == 1 and "FAILED" in out and "1 gates failed" in out
    assert "tokenizer: other ids" in out or "tokenizer: the tokenizer in" in out
    report = verify(own)
    assert (report.failures, report.cause) == (1, "tokenizer")
    assert "tokenizer: " in render_html(gather(own, verify=report))


def test_a_conversion_without_a_record_verifies_and_says_so(own, checkpoint, capsys):
    as_it_used_to_be(own, checkpoint)
    code, out = command(capsys, "verify", own)
    assert code == 0 and "tokenizer: not compared: the conversion did not record" in out
    assert verify(own, checkpoint=checkpoint).tokenizer.passed


def test_converting_again_gives_the_same_bytes_and_sweeps_the_files_of_before(
    own, conversion, checkpoint
):
    as_it_used_to_be(own, checkpoint)
    for name in ("special_tokens_map.json", "tokenizer.model", "vocab.json"):
        (own / name).write_text("{}")
    tiny_conversion(checkpoint, own, golden=True)
    contents = [
        {
            path.relative_to(folder): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        for folder in (own, conversion)
    ]
    assert contents[0] == contents[1]
