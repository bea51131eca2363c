"""The tokenizer of a GGUF file as data, checked: what is built of it cannot fail for the data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

GGML = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*%s"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CLITICS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"


@dataclass(frozen=True)
class Pre:
    """How text is cut before merges: by each expression in its turn. `composed`: text is brought to
    Unicode's form NFC before, as the tokenizers of these names do, which the file does not say.
    `whole`: a piece that is a token is taken without merges."""

    cuts: tuple[str, ...]
    composed: bool = False
    whole: bool = False


# By llama.cpp's name of the pre-tokenizer (`llama-vocab.cpp`).
PRE = {
    "default": Pre((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": Pre((GPT2,)),
    "olmo": Pre((GPT2,), composed=True),
    "refact": Pre((r"\p{N}", GPT2)),
    "smollm": Pre((r"\p{N}", GPT2)),
    "qwen2": Pre((QWEN2,), composed=True),
    "llama-bpe": Pre((LLAMA3,), whole=True),
    "lfm2": Pre((LLAMA3,), whole=True),
    "dbrx": Pre((LLAMA3,)),
    "tekken": Pre((WORDS % ("", "") + r"|\p{N}|" + REST,), whole=True),
    "gpt-4o": Pre((WORDS % (CLITICS, CLITICS) + r"|\p{N}{1,3}|" + REST,)),
}


@dataclass(frozen=True)
class Vocabulary:
    """`tokens` by their ids, with their `kinds`; of byte-level BPE `merges` and `pre`, of
    sentencepiece `scores`. `special` are tokens by transformers' names of them."""

    model: str
    tokens: list[str]
    kinds: list[int]
    merges: list[tuple[str, str]]
    scores: list[float]
    pre: Pre | None
    special: dict[str, str]
    add_bos: bool
    add_eos: bool
    space_first: bool
    template: str | None


class _Unknown(Exception):
    """What cannot be read."""


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary | str:
    """The vocabulary, or why there is none that can be read."""
    try:
        return _vocabulary(metadata)
    except _Unknown as found:
        return str(found)


def _vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    own = (key for key in metadata if key.startswith(GGML))
    facts = {key.removeprefix(GGML): metadata[key] for key in own}
    model, tokens = facts.get("model"), facts.get("tokens")
    if model not in (BYTE_LEVEL, SENTENCEPIECE):
        raise _Unknown(f"its model is {str(model)[:40]!r}; known: {BYTE_LEVEL}, {SENTENCEPIECE}")
    if not isinstance(tokens, list) or not _texts(tokens):
        raise _Unknown("no tokens that are texts")
    if model == SENTENCEPIECE and "scores" not in facts:
        raise _Unknown("no scores")
    pre = _pre(facts.get("pre", "default")) if model == BYTE_LEVEL else None
    first = model == SENTENCEPIECE or (pre is not None and pre.whole)  # llama.cpp's own defaults
    template = metadata.get(TEMPLATE)
    return Vocabulary(
        model,
        tokens,
        _numbers(facts.get("token_type"), np.integer, [NORMAL] * len(tokens)),
        _merges(facts.get("merges"), {*tokens}) if model == BYTE_LEVEL else [],
        _numbers(facts.get("scores"), np.floating, [0.0] * len(tokens)),
        pre,
        _special(facts, tokens),
        facts.get("add_bos_token", first) is True,
        facts.get("add_eos_token", False) is True,
        facts.get("add_space_prefix", True) is True,
        template if isinstance(template, str) and _texts([template]) else None,
    )


def _pre(name: Any) -> Pre:
    if not isinstance(name, str) or name not in PRE:
        raise _Unknown(f"its pre-tokenizer is {str(name)[:40]!r}; known: {', '.join(PRE)}")
    return PRE[name]


def _special(facts: Mapping[str, Any], tokens: list[str]) -> dict[str, str]:
    special = {}
    for name, key in SPECIAL.items():
        number = facts.get(key)
        if number is None:
            continue
        if not (isinstance(number, int) and 0 <= number < len(tokens)):
            raise _Unknown(f"{key} is {str(number)[:40]}")
        special[name] = tokens[number]
    return special


def _texts(values: list[Any]) -> bool:
    """Whether all are texts of Unicode."""
    try:
        for value in values:
            value.encode()
    except (AttributeError, UnicodeEncodeError):
        return False
    return True


def _numbers(values: Any, kind: type, otherwise: list[Any]) -> list[Any]:
    """As many numbers as tokens."""
    if values is None:
        return otherwise
    right = isinstance(values, np.ndarray) and np.issubdtype(values.dtype, kind)
    if not right or len(values) != len(otherwise):
        raise _Unknown("not as many types or scores as tokens")
    return list(values.tolist())


def _merges(values: Any, tokens: set[str]) -> list[tuple[str, str]]:
    if not isinstance(values, list) or not _texts(values):
        raise _Unknown("no merges that are texts")
    pairs = [value.partition(" ") for value in values]
    if not all({left, right, left + right} <= tokens for left, _, right in pairs):
        raise _Unknown("merges that are not of its tokens")
    return [(left, right) for left, _, right in pairs]
