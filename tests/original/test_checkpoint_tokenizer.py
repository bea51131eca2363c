"""A conversion's tokenizer against Hugging Face's AutoTokenizer in the checkpoint, form by form."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from ane_moe.conversion.pipeline import ConvertOptions, convert, plan
from ane_moe.errors import UserError
from ane_moe.loop.tokenizer import load_tokenizer
from ane_moe.original.checkpoint_tokenizer import read_tokenizer, vocabulary_files, write_tokenizer
from ane_moe.original.tokenizer_record import MAX_BYTES, differences, read_record, record_of
from tests.models import make_model, save_checkpoint
from tests.runtime.numpy_shards import make_manifest
from tests.tokenizer_forms import (
    FAMILIES,
    FORMS,
    INSTRUCT,
    byte_level,
    mixtral_settings,
    tokenizer_checkpoint,
)

CLASSES = (
    "LlamaTokenizer",
    "Qwen2Tokenizer",
    "GPT2Tokenizer",
    "GPTNeoXTokenizerFast",
    "PreTrainedTokenizerFast",
    "UnheardOfTokenizer",
)
TEXTS = (
    "go hello",
    "  two  spaces ",
    "x=12345",
    "日本語 مرحبا café",
    "def f(x):\n\n    return x\n",
    "a<s>b</s> <|im_start|>user\nhi<|im_end|> <extra> ",
    "\U0001f469‍\U0001f467",
    "",
)
MESSAGES = [{"role": "user", "content": "go hello\n 42"}]


def hugging_face(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)


def ids_of(tokenizer):
    """Ids of the texts and of a chat, and the text of every id; of a transformers tokenizer."""
    ids = [list(tokenizer(text)["input_ids"]) for text in TEXTS]
    if tokenizer.chat_template:
        ids.append(
            tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
        )
    texts = [
        tokenizer.decode([identifier], skip_special_tokens=skipped)
        for identifier in range(len(tokenizer))
        for skipped in (False, True)
    ]
    return ids, texts, tokenizer.all_special_ids


def kept(checkpoint, out):
    """The tokenizer that a conversion of `checkpoint` would keep in `out`, and its manifest."""
    out.mkdir()
    files = write_tokenizer(read_tokenizer(checkpoint), out)
    manifest = replace(
        make_manifest((None,)),
        tokenizer=files.names,
        tokenizer_record=files.record,
        tokenizer_class=files.class_name,
    )
    return load_tokenizer(out, manifest), manifest


def is_empty(tokenizer):
    """Whether transformers made one without a vocabulary, which it does without a word."""
    return len(tokenizer) <= 8


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMS)
def test_the_conversion_gives_the_ids_of_the_checkpoint_whatever_class_it_names(
    form, family, tmp_path
):
    for number, name in enumerate((None, *CLASSES)):
        settings = (
            None
            if name is None
            else mixtral_settings(tokenizer_class=name, additional_special_tokens=["<extra>"])
        )
        checkpoint = tokenizer_checkpoint(tmp_path / f"checkpoint{number}", family, form, settings)
        try:
            original = hugging_face(checkpoint)
        except ValueError:
            original = None
        if original is None or is_empty(original):
            assert form == "vocab.json and merges.txt"  # of a class that does not read them
            with pytest.raises(UserError, match=r"vocab\.json, merges\.txt|vocab\.json"):
                read_tokenizer(checkpoint)
            continue
        tokenizer, _ = kept(checkpoint, tmp_path / f"out{number}")
        assert ids_of(tokenizer.loaded) == ids_of(original), name
        saved = (tmp_path / f"out{number}/tokenizer_config.json").read_text()
        assert str(tmp_path) not in saved


def added_tokens(folder):
    """The forms of transformers 4: tokens beside the vocabulary, in files of their own."""
    size = byte_level().get_vocab_size()
    (folder / "added_tokens.json").write_text(json.dumps({"<|tool|>": size, "<extra>": size + 1}))
    (folder / "special_tokens_map.json").write_text(
        json.dumps(
            {
                "eos_token": {
                    "content": "<|im_end|>",
                    "lstrip": True,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                },
                "additional_special_tokens": ["<extra>"],
            }
        )
    )


def template_list(folder):
    named = [{"name": "default", "template": INSTRUCT}, {"name": "tool_use", "template": "{{ 7 }}"}]
    settings = mixtral_settings(tokenizer_class="Qwen2Tokenizer", chat_template=named)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def template_file(folder):
    """A file goes before the field."""
    (folder / "chat_template.jinja").write_text("<|im_start|>file: {{ messages[0].content }}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "field"}))


def template_files(folder):
    template_file(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/rag.jinja").write_text("<s>{{ messages[0].content }}")


def template_outside(folder):
    """A name that would be a path."""
    named = [{"name": "default", "template": INSTRUCT}, {"name": "../../out", "template": "x"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))


def flags(folder):
    """Settings that change ids or decoding without being in tokenizer.json."""
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "Qwen2Tokenizer",
                "split_special_tokens": True,
                "image_token": "<image>",
                "clean_up_tokenization_spaces": True,
                "model_max_length": 20,
            }
        )
    )


@pytest.mark.parametrize(
    "beside", [added_tokens, template_list, template_file, template_files, template_outside, flags]
)
@pytest.mark.parametrize("form", ["byte-level tokenizer.json", "vocab.json and merges.txt"])
@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe"])
def test_what_lies_beside_the_vocabulary_is_kept(family, form, beside, tmp_path):
    checkpoint = tokenizer_checkpoint(tmp_path / "checkpoint", family, form)
    beside(checkpoint)
    original = hugging_face(checkpoint)
    loaded = kept(checkpoint, tmp_path / "out")[0].loaded
    assert ids_of(loaded) == ids_of(original)
    assert loaded.chat_template == original.chat_template
    assert loaded.special_tokens_map == original.special_tokens_map
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "out"}


def test_tokenizers_that_have_no_fast_form_are_kept_as_they_are(tmp_path):
    checkpoint = tokenizer_checkpoint(
        tmp_path / "checkpoint",
        "qwen3_moe",
        "sentencepiece bpe",
        {"tokenizer_class": "GPTSw3Tokenizer"},
    )
    original = hugging_face(checkpoint)
    assert not original.is_fast
    tokenizer, manifest = kept(checkpoint, tmp_path / "out")
    assert ids_of(tokenizer.loaded) == ids_of(original)
    assert (tokenizer.loaded.__class__, manifest.tokenizer_class) == (
        type(original),
        "GPTSw3Tokenizer",
    )


def test_a_config_beside_the_kept_files_changes_nothing(tmp_path):
    checkpoint = tokenizer_checkpoint(
        tmp_path / "checkpoint", "qwen3_moe", "byte-level tokenizer.json"
    )
    _, manifest = kept(checkpoint, tmp_path / "out")
    shutil.copy(checkpoint / "config.json", tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out", manifest)
    assert ids_of(tokenizer.loaded) == ids_of(hugging_face(checkpoint))


@pytest.mark.parametrize(
    "family, form, settings",
    [
        ("mixtral", "metaspace tokenizer.json", mixtral_settings()),
        ("qwen3_moe", "byte-level tokenizer.json", None),
        ("qwen2_moe", "vocab.json and merges.txt", None),
    ],
)
def test_the_copied_files_of_older_conversions_are_read_by_the_models_class(
    family, form, settings, tmp_path
):
    checkpoint = tokenizer_checkpoint(tmp_path / "checkpoint", family, form, settings)
    out = shutil.copytree(
        checkpoint, tmp_path / "out", ignore=shutil.ignore_patterns("config.json")
    )
    manifest = replace(make_manifest((None,)), family=family, tokenizer=("tokenizer.json",))
    tokenizer = load_tokenizer(out, manifest)
    assert ids_of(tokenizer.loaded) == ids_of(hugging_face(checkpoint))


@pytest.mark.parametrize("name", ["AutoModel", "pipeline", "NoSuchTokenizer"])
def test_a_manifest_can_name_no_class_but_a_tokenizers(name, tmp_path):
    manifest = replace(make_manifest((None,)), tokenizer=("tokenizer.json",), tokenizer_class=name)
    with pytest.raises(UserError, match=r"the tokenizer in .* cannot be read"):
        load_tokenizer(tmp_path, manifest)


def test_without_a_vocabulary_there_is_no_tokenizer(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    assert vocabulary_files(tmp_path) == () and read_tokenizer(tmp_path) is None


def test_a_checkpoints_own_code_is_not_run(tmp_path):
    (tmp_path / "qwen.tiktoken").write_bytes(b"IQ== 0\n")
    marker = tmp_path / "was_run"
    (tmp_path / "tokenization.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_moe"}')
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization.Own", null]}}'
    )
    with pytest.raises(UserError, match="cannot be read") as caught:
        read_tokenizer(tmp_path)
    assert "\n" not in str(caught.value) and not marker.exists()


def test_code_that_is_not_needed_is_not_named_in_what_is_kept(tmp_path):
    checkpoint = tokenizer_checkpoint(
        tmp_path / "checkpoint",
        "qwen3_moe",
        "byte-level tokenizer.json",
        {"tokenizer_class": "Qwen2Tokenizer", "auto_map": {"AutoTokenizer": [None, "own.Own"]}},
    )
    tokenizer, _ = kept(checkpoint, tmp_path / "out")
    assert (
        tokenizer.encode("go")
        and "own.Own" not in (tmp_path / "out/tokenizer_config.json").read_text()
    )


WITHOUT_PACKAGES = """
import sys
from pathlib import Path
sys.modules |= {"sentencepiece": None, "tiktoken": None}
from ane_moe.original.checkpoint_tokenizer import read_tokenizer
from ane_moe.errors import UserError
for checkpoint in sys.argv[1:]:
    try:
        read_tokenizer(Path(checkpoint))
    except UserError as error:
        print(error)
"""


def test_the_package_that_a_tokenizer_needs_is_named(tmp_path):
    forms = {"sentencepiece": "sentencepiece bpe", "tiktoken": "tiktoken as tokenizer.model"}
    folders = [
        tokenizer_checkpoint(tmp_path / package, "mixtral", form) for package, form in forms.items()
    ]
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGES, *folders],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert ended.stderr == ""
    for line, package in zip(ended.stdout.splitlines(), forms, strict=True):
        assert f"needs the package {package}, which is not installed; pip install {package}" in line


@pytest.mark.parametrize(
    "start", [convert, lambda checkpoint, out: plan(checkpoint, ConvertOptions())]
)
def test_a_tokenizer_that_cannot_be_read_is_refused_before_anything_is_written(start, tmp_path):
    checkpoint = save_checkpoint(make_model("mixtral"), tmp_path / "checkpoint")
    tokenizer_checkpoint(checkpoint, "mixtral", "vocab.json and merges.txt")
    with pytest.raises(UserError, match=r"its tokenizer cannot be read; .* from vocab\.json"):
        start(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_record_is_the_same_every_day_and_tells_another_tokenizer(tmp_path):
    dated = "{{ strftime_now('%Y-%m-%d') }} {{ messages[0].content }}"
    checkpoint = tokenizer_checkpoint(
        tmp_path / "one",
        "qwen3_moe",
        "byte-level tokenizer.json",
        mixtral_settings(chat_template=dated),
    )
    tokenizer = read_tokenizer(checkpoint)
    record = record_of(tokenizer)
    message = "2024 " + record.chat.text
    assert list(record.chat.ids) == hugging_face(checkpoint)(message)["input_ids"]
    today = date.today().isoformat() + " go"
    assert tokenizer.encode_chat("go") == hugging_face(checkpoint)(today)["input_ids"]
    record.write(tmp_path / "record.json")
    assert read_record(tmp_path / "record.json") == record and differences(record, tokenizer) == ()
    other = tokenizer_checkpoint(tmp_path / "two", "qwen3_moe", "byte-level tokenizer.json")
    wrong = differences(record, read_tokenizer(other))  # digits one by one, no template
    assert "\t" not in wrong[0].text and any("1234567" in difference.text for difference in wrong)
    assert wrong[-1].text == record.chat.text and wrong[-1].found is None


def test_special_tokens_inside_text_are_part_of_a_record(tmp_path):
    checkpoint = tokenizer_checkpoint(
        tmp_path, "mixtral", "metaspace tokenizer.json", mixtral_settings()
    )
    texts = [entry.text for entry in record_of(read_tokenizer(checkpoint)).texts]
    for token in ("<s>", "</s>", "<|im_start|>"):
        assert f"one{token}two {token} three\n{token}" in texts


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        '{"texts": [{"text": "a", "ids": [1.5]}], "chat": null}',
        '{"texts": [{"text": 1, "ids": []}], "chat": null}',
        "{",
        " " * (MAX_BYTES + 1),
    ],
)
def test_a_file_that_is_no_record_is_refused(content, tmp_path):
    (tmp_path / "record.json").write_text(content)
    with pytest.raises(UserError, match="not a record of a tokenizer"):
        read_record(tmp_path / "record.json")


def test_a_template_that_refuses_the_message_is_one_clear_error(tmp_path):
    template = "{{ raise_exception('a system message comes first') }}"
    tokenizer = read_tokenizer(
        tokenizer_checkpoint(
            tmp_path,
            "qwen3_moe",
            "byte-level tokenizer.json",
            mixtral_settings(chat_template=template),
        )
    )
    assert record_of(tokenizer).chat is None
    with pytest.raises(UserError, match="a system message comes first; give other messages"):
        tokenizer.encode_chat("go")
