"""Tiny tokenizers in every form that checkpoints have, trained on the fly."""

import base64
import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import sentencepiece
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoConfig
from transformers.convert_slow_tokenizer import bytes_to_unicode

FAMILIES = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "granitemoe")
CORPUS = [
    "The year 2024 and 1234567 items. Don't go?? \n\n  indent x=10; def f(x): return x"
    " naïve café 日本語 مرحبا"
] * 20
SPECIAL = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Groups of three digits, unlike Qwen's own class, and a white space rule unlike GPT-2's.
WORDS = r"\p{L}+| ?\p{N}{1,3}|[^\s\p{L}\p{N}]+|\s+"
INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


@cache
def byte_level() -> Tokenizer:
    """Byte-level BPE, as Qwen, OLMoE and Granite have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=SPECIAL,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return tokenizer


@cache
def metaspace() -> Tokenizer:
    """BPE with `▁` before the first word only and byte fallback, as Mixtral's repository has it."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    single_bytes = [f"<0x{value:02X}>" for value in range(256)]
    trained.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIAL + single_bytes, show_progress=False
        ),
    )
    tokenizer = Tokenizer(trained.model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


@cache
def sentencepiece_model(kind: str) -> bytes:
    """A model file of sentencepiece's own trainer; `kind` is bpe or unigram."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=out,
        model_type=kind,
        vocab_size=330,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        minloglevel=2,
        user_defined_symbols=["<|im_start|>"],
    )
    return out.getvalue()


@cache
def byte_pieces() -> tuple[bytes, ...]:
    """The byte strings of `byte_level`, by rank."""
    values = {character: value for value, character in bytes_to_unicode().items()}
    vocabulary = json.loads(byte_level().to_str())["model"]["vocab"]
    return tuple(bytes(map(values.get, piece)) for piece in vocabulary if piece not in SPECIAL)


def tiktoken_file() -> bytes:
    """Lines of a byte string in base64 and its rank."""
    lines = [base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(byte_pieces())]
    return b"".join(lines)


def tekken_file() -> bytes:
    """Mistral's JSON form of the same."""
    pieces = [
        {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": None}
        for rank, piece in enumerate(byte_pieces())
    ]
    special = [
        {"rank": rank, "token_str": token, "is_control": True}
        for rank, token in enumerate(["<unk>", "<s>", "</s>", "[INST]", "[/INST]"])
    ]
    config = {
        "pattern": WORDS,
        "version": "v7",
        "num_vocab_tokens": len(pieces),
        "default_vocab_size": len(pieces) + 10,
        "default_num_special_tokens": 10,
    }
    return json.dumps({"config": config, "vocab": pieces, "special_tokens": special}).encode()


FORMS: dict[str, Callable[[Path], object]] = {
    "byte-level tokenizer.json": lambda folder: byte_level().save(str(folder / "tokenizer.json")),
    "metaspace tokenizer.json": lambda folder: metaspace().save(str(folder / "tokenizer.json")),
    "vocab.json and merges.txt": lambda folder: byte_level().model.save(str(folder)),
    "sentencepiece bpe": lambda folder: _put(folder, "tokenizer.model", sentencepiece_model("bpe")),
    "sentencepiece unigram": lambda folder: _put(
        folder, "tokenizer.model", sentencepiece_model("unigram")
    ),
    "tiktoken as tokenizer.model": lambda folder: _put(folder, "tokenizer.model", tiktoken_file()),
    "tiktoken.model": lambda folder: _put(folder, "tiktoken.model", tiktoken_file()),
    "tekken.json": lambda folder: _put(folder, "tekken.json", tekken_file()),
}


def tokenizer_checkpoint(
    folder: Path, family: str, form: str, settings: dict[str, object] | None = None
) -> Path:
    """`folder` with config.json, the tokenizer files and, where given, tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text(AutoConfig.for_model(family).to_json_string())
    FORMS[form](folder)
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def mixtral_settings(**changes: object) -> dict[str, object]:
    """tokenizer_config.json as Mixtral's repository has it, in what matters."""
    return {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": True,
        "chat_template": INSTRUCT,
    } | changes


def _put(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
