"""Prompts of a golden: the built-in texts through a real tokenizer, and files."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

import ane_moe.demo
from ane_moe.errors import UserError
from ane_moe.original.prompts import builtin_prompts, check_prompts, read_prompts

DEMO = Path(ane_moe.demo.__file__).parent / "checkpoint"
PREFILL_CHUNK, MOST_TOKENS = 64, 256


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


def test_the_built_in_prompts_are_text_longer_than_a_prefill_chunk_and_few_tokens_in_all(tokenizer):
    prompts = builtin_prompts(DEMO, len(tokenizer), 2048)
    assert len(prompts) >= 5 and sum(map(len, prompts)) <= MOST_TOKENS
    assert max(map(len, prompts)) > PREFILL_CHUNK
    assert "lighthouse" in tokenizer.decode(prompts[0]) and "def merge" in tokenizer.decode(
        prompts[1]
    )
    check_prompts(prompts, len(tokenizer), 2048)


def test_the_built_in_prompts_are_cut_to_a_short_context(tokenizer):
    assert max(map(len, builtin_prompts(DEMO, len(tokenizer), 10))) == 10


def test_random_prompts_are_the_same_every_time(tmp_path):
    assert builtin_prompts(tmp_path, 50, 2048) == builtin_prompts(tmp_path, 50, 2048)


def test_a_text_file_is_parted_by_lines_of_dashes(tokenizer, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("first line\nsecond line\n---\nanother — prompt\n", encoding="utf-8")
    read = [tokenizer.decode(ids) for ids in read_prompts(path, DEMO)]
    assert read == ["first line\nsecond line", "another — prompt"]


def test_a_json_file_may_mix_texts_and_ids(tokenizer, tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text('["some text", [1, 2, 3]]')
    assert read_prompts(path, DEMO) == [tokenizer("some text")["input_ids"], [1, 2, 3]]


@pytest.mark.parametrize("content", [b"\xff\xfe\xfa", b"", b"---\n"])
def test_a_file_without_readable_prompts_is_one_error(content, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(UserError):
        read_prompts(path, DEMO)


def test_a_damaged_tokenizer_is_one_error(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer"):
        builtin_prompts(tmp_path, 50, 2048)
