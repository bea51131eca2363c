"""The prompts a golden is captured on: a built-in set, a file, or seeded random ids where there is
no tokenizer."""

import json
from collections.abc import Sequence
from importlib.resources import files
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from ane_moe.errors import UserError
from ane_moe.loop.tokenizer import Tokenizer, load_tokenizer
from ane_moe.manifest import FILE_NAME, read_manifest
from ane_moe.original.checkpoint_tokenizer import read_tokenizer

SEPARATOR = "---"
# Tokens kept of the built-in prompts: one longer than a prefill chunk of 64, the others short; at
# most 256 in all.
LONGEST, SHORT = 100, 26
RANDOM_LENGTHS = (LONGEST, SHORT, 1, SHORT)


def builtin_prompts(
    checkpoint: Path, vocab: int, context: int, lengths: Sequence[int] = ()
) -> list[list[int]]:
    """Token ids of the built-in set, cut to `context`; random ids from a fixed seed without a
    tokenizer. For the `lengths` of an encoder, in place of those: one that fills each of them, and
    one that leaves room in all."""
    prompts = _builtin(checkpoint, vocab)
    if lengths:
        text = list(chain.from_iterable(prompts))
        short = lengths[0] // 2 + 1
        return [list(islice(cycle(text), count)) for count in (short, *lengths)]
    return [prompt[:context] for prompt in prompts]


def _builtin(checkpoint: Path, vocab: int) -> list[list[int]]:
    tokenizer = _tokenizer(checkpoint)
    if tokenizer is None:
        rng = np.random.default_rng(0)
        prompts = [rng.integers(0, vocab, length).tolist() for length in RANDOM_LENGTHS]
    else:
        texts = _texts(
            files("ane_moe.original").joinpath("prompts.txt").read_text(encoding="utf-8")
        )
        tokens = [tokenizer.encode(text) for text in texts]
        longest = max(range(len(tokens)), key=lambda index: len(tokens[index]))
        prompts = [
            ids[: LONGEST if index == longest else SHORT] for index, ids in enumerate(tokens)
        ]
    return prompts


def read_prompts(path: Path, source: Path) -> list[list[int]]:
    """Prompts of a file: text parted by lines of `---`, or JSON, a list of texts and lists of token
    ids.

    `source` is the checkpoint or the conversion whose tokenizer texts go through. Raises UserError
    when the file cannot be read, is empty, or holds text and `source` has no tokenizer.
    """
    try:
        text = path.read_text(encoding="utf-8")
        prompts = json.loads(text) if path.suffix == ".json" else _texts(text)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read", str(error), "give UTF-8 text, or JSON") from None
    if not isinstance(prompts, list) or not prompts:
        raise UserError(
            f"{path} holds no prompts", "nothing to run", f"part prompts by lines of {SEPARATOR}"
        )
    tokenizer = _tokenizer(source) if any(isinstance(prompt, str) for prompt in prompts) else None
    return [_ids(prompt, tokenizer, path) for prompt in prompts]


def check_prompts(prompts: list[list[int]], vocab: int, context: int) -> None:
    """Raise UserError for an empty prompt, an id outside the vocabulary, or more tokens than the
    context holds."""
    for number, prompt in enumerate(prompts, start=1):
        wrong = [identifier for identifier in prompt if not 0 <= identifier < vocab]
        if wrong:
            raise UserError(
                f"prompt {number} has an id outside the vocabulary",
                str(wrong[0]),
                f"ids go from 0 to {vocab - 1}",
            )
        if not 0 < len(prompt) <= context:
            raise UserError(
                f"prompt {number} does not fit the context",
                f"{len(prompt)} tokens",
                f"give 1 to {context} tokens",
            )


def cut_passages(prompts: list[list[int]], window: int, max_tokens: int) -> list[list[int]]:
    """Prompts cut into passages of at most `window` tokens, `max_tokens` in all."""
    passages: list[list[int]] = []
    room = max_tokens
    for prompt in prompts:
        for first in range(0, len(prompt), window):
            if room > 0:
                passages.append(prompt[first : first + min(window, room)])
                room -= len(passages[-1])
    return passages


def _ids(prompt: Any, tokenizer: Tokenizer | None, path: Path) -> list[int]:
    if isinstance(prompt, list) and all(type(identifier) is int for identifier in prompt):
        return prompt
    if not isinstance(prompt, str):
        raise UserError(
            f"{path} holds something that is no prompt",
            repr(prompt)[:60],
            "give texts or lists of ids",
        )
    if tokenizer is None:
        raise UserError(
            f"{path} holds text, and the checkpoint has no tokenizer",
            repr(prompt)[:60],
            "give lists of token ids in a .json file",
        )
    return tokenizer.encode(prompt)


def _texts(text: str) -> list[str]:
    parts: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.rstrip() == SEPARATOR:
            parts.append([])
        else:
            parts[-1].append(line)
    texts = ["\n".join(part).strip("\n") for part in parts]
    return [text for text in texts if text.strip()]


def _tokenizer(source: Path) -> Tokenizer | None:
    """A conversion's or a checkpoint's own tokenizer, or None when it has none."""
    if (source / FILE_NAME).is_file():
        return load_tokenizer(source, read_manifest(source))
    return read_tokenizer(source)
