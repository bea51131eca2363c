"""Numpy shards with a tokenizer of one character per id, `!` to `I`."""

import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ane_moe.loop.shards import LoadedShards
from tests.runtime.numpy_shards import VOCAB, Decoder, make_manifest, make_shards

CHAT = "{% for m in messages %}<{{ m.content }}>{% endfor %}!"
LETTERS = [chr(ord("!") + index) for index in range(VOCAB)]


def letter_shards(folder: Path, template: str | None = CHAT, context: int = 64) -> LoadedShards:
    """The shards; their tokenizer is saved in `folder`."""
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(LETTERS)}, []))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    saved = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)
    saved.save_pretrained(folder)
    shards = make_shards(Decoder((None,)), make_manifest((None,), context=context))
    object.__setattr__(shards.manifest, "tokenizer", ("tokenizer.json",))
    object.__setattr__(shards.manifest, "tokenizer_class", "PreTrainedTokenizerFast")
    return shards


def serve_shards(patch: pytest.MonkeyPatch, shards: LoadedShards) -> None:
    """What is opened from now on is these."""
    patch.setattr("ane_moe.loop.opened.load_shards", lambda *given, **options: shards)


def slowed(shards: LoadedShards, seconds: float) -> LoadedShards:
    """The same, each call of the first shard taking so long at least."""
    for function in shards.loaded[0].functions.values():
        call = function.call

        def slow(inputs, state, call=call):
            time.sleep(seconds)
            return call(inputs, state)

        function.call = slow
    return shards
