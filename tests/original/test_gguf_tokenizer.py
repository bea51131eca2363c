"""Tokenizers out of GGUF vocabularies, against those that they were written from, sentencepiece's
own, and transformers' reader of the same files."""

import io
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from ane_moe.checkpoints.gguf.header import read_gguf
from ane_moe.checkpoints.gguf.vocabulary import (
    CONTROL,
    NORMAL,
    PRE,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    read_vocabulary,
)
from ane_moe.original.checkpoint_tokenizer import read_tokenizer, write_tokenizer
from ane_moe.original.prompts import _texts

TEXTS = [
    "Hello world, it's 12345.67 o'clock!",
    "  two spaces,\ttabs\n\n and   lines\r\n",
    "ÀÉÎõü naïve Straße ФИШКИ 日本語のテキスト 한국어 emoji 🙂👍🏽 a\u0301b",
    "def f(x):\n    return {'a': x**2}  # I'LL WE'VE don't\n",
    "<|im_start|>user\nhi<|im_end|> <think>x</think>",
    "",
    " ",
]
CORPUS = [*TEXTS, *_texts(Path("ane_moe/original/prompts.txt").read_text())]


def written(file: Path, **facts: Any) -> Path:
    writer = gguf.GGUFWriter(file, "qwen3moe")
    for method, value in facts.items():
        getattr(writer, method)(value)
    writer.add_tensor("some", np.ones((2, 3), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def trained(pre: str) -> Tokenizer:
    """A byte-level BPE whose text is cut as `pre` says."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=PRE[pre].whole))
    cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in PRE[pre].cuts]
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, plain])
    tokenizer.decoder = decoders.ByteLevel()
    if PRE[pre].composed:
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["<think>"])
    return tokenizer


def byte_level(file: Path, tokenizer: Tokenizer, pre: str, **facts: Any) -> Path:
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    kinds = [CONTROL if t.startswith("<|im") else NORMAL for t in tokens]
    kinds[vocabulary["<think>"]] = USER_DEFINED
    return written(
        file,
        add_tokenizer_model="gpt2",
        add_tokenizer_pre=pre,
        add_token_list=[*tokens, "[PAD1]"],
        add_token_types=[*kinds, UNUSED],
        add_token_merges=[" ".join(merge) for merge in merges],
        add_eos_token_id=vocabulary["<|im_end|>"],
        **facts,
    )


@pytest.mark.parametrize("pre", PRE)
def test_a_byte_level_tokenizer_is_the_one_it_was_written_from(pre: str, tmp_path: Path) -> None:
    original = trained(pre)
    file = byte_level(tmp_path / "m.gguf", original, pre, add_add_bos_token=False)
    found = read_tokenizer(file)
    assert found is not None
    for text in CORPUS:
        ids = original.encode(text).ids
        assert found.encode(text) == ids, text
        assert found.loaded.decode(ids) == original.decode(ids, skip_special_tokens=False)
    assert found.loaded.eos_token == "<|im_end|>"


@pytest.mark.parametrize("pre", sorted(GGUF_PRE_TOKENIZER_SPLITS.keys() & PRE.keys()))
def test_text_is_cut_as_transformers_cuts_it(pre: str, tmp_path: Path) -> None:
    file = byte_level(tmp_path / "m.gguf", trained(pre), pre, add_add_bos_token=False)
    architecture, facts, _ = get_gguf_tokenizer(str(file))
    theirs, _ = convert_gguf_tokenizer(architecture, facts)
    ours = read_tokenizer(file)
    assert ours is not None
    composed = [normalizers.NFC().normalize_str(text) for text in CORPUS]
    for text in composed:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize("pre", ["gpt-2", "olmo", "refact", "smollm"])
def test_text_is_cut_as_gpt_2_cuts_it(pre: str, tmp_path: Path) -> None:
    """The library's own expression, and with it digits one by one."""
    found = read_tokenizer(byte_level(tmp_path / "m.gguf", trained(pre), pre))
    assert found is not None
    ours = found.loaded.backend_tokenizer.pre_tokenizer
    digits = [pre_tokenizers.Digits(individual_digits=True)] if len(PRE[pre].cuts) > 1 else []
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs = pre_tokenizers.Sequence([*digits, plain])
    for text in CORPUS:
        assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text)


@pytest.fixture(scope="module")
def pieces() -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def kind_of(pieces: sentencepiece.SentencePieceProcessor, number: int) -> int:
    asked = (pieces.is_unknown, pieces.is_control, pieces.is_unused, pieces.is_byte)
    kinds = (2, CONTROL, UNUSED, 6)
    return next((k for ask, k in zip(asked, kinds, strict=True) if ask(number)), NORMAL)


def test_a_sentencepiece_tokenizer_gives_the_ids_of_sentencepiece(
    pieces: sentencepiece.SentencePieceProcessor, tmp_path: Path
) -> None:
    numbers = range(pieces.get_piece_size())
    file = written(
        tmp_path / "m.gguf",
        add_tokenizer_model="llama",
        add_token_list=[pieces.id_to_piece(number) for number in numbers],
        add_token_scores=[pieces.get_score(number) for number in numbers],
        add_token_types=[kind_of(pieces, number) for number in numbers],
        add_bos_token_id=pieces.bos_id(),
        add_eos_token_id=pieces.eos_id(),
        add_unk_token_id=pieces.unk_id(),
    )
    found = read_tokenizer(file)
    assert found is not None
    for text in filter(None, CORPUS):
        ids = pieces.encode(text)
        assert found.encode(text) == [pieces.bos_id(), *ids], text
        assert found.loaded.decode(ids) == pieces.decode(ids)


def test_template_and_ends_of_texts_are_taken_over(tmp_path: Path) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    original = trained("llama-bpe")
    first = original.token_to_id("<|im_start|>")
    facts = {"add_bos_token_id": first, "add_chat_template": template}
    file = byte_level(tmp_path / "m.gguf", original, "llama-bpe", **facts)
    found = read_tokenizer(file)
    assert found is not None and found.has_chat_template
    assert found.encode("hi")[0] == first
    last = original.token_to_id("<|im_end|>")
    ids = found.encode_chat("hi")
    assert ids.count(last) == 1
    files = write_tokenizer(found, tmp_path)
    assert files.class_name == "PreTrainedTokenizerFast"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"tokenizer.ggml.model": "bert"}, "its model is 'bert'"),
        ({"tokenizer.ggml.pre": "new"}, "its pre-tokenizer is 'new'"),
        ({"tokenizer.ggml.tokens": None}, "no tokens"),
        ({"tokenizer.ggml.tokens": ["\udc80"]}, "no tokens that are texts"),
        ({"tokenizer.ggml.token_type": np.ones(3)}, "not as many types"),
        ({"tokenizer.ggml.merges": None}, "no merges"),
        ({"tokenizer.ggml.merges": ["a b"]}, "merges that are not of its tokens"),
        ({"tokenizer.ggml.merges": ["Ġt"]}, "merges that are not of its tokens"),
        ({"tokenizer.ggml.bos_token_id": 1 << 30}, "bos_token_id is"),
        ({"tokenizer.ggml.model": "llama"}, "no scores"),
    ],
)
def test_a_vocabulary_that_cannot_be_rebuilt_says_why(
    changed: dict[str, Any], said: str, tmp_path: Path
) -> None:
    metadata = read_gguf(byte_level(tmp_path / "m.gguf", trained("qwen2"), "qwen2")).metadata
    assert isinstance(read_vocabulary(metadata), Vocabulary)
    found = read_vocabulary(metadata | changed)
    assert isinstance(found, str) and found.startswith(said)
