"""A prompt that ends in white space: its last token is taken back and completed by the first new
one."""

import numpy as np
import pytest

from ane_moe.demo import demo_checkpoint
from ane_moe.loop.generation import GenerateOptions, generate
from ane_moe.loop.session import Session
from ane_moe.loop.tokenizer import Begun, TextStream, Tokenizer
from ane_moe.original.checkpoint_tokenizer import read_tokenizer
from tests.runtime.numpy_shards import VOCAB, Decoder, make_manifest, make_shards


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return read_tokenizer(demo_checkpoint())


@pytest.mark.parametrize("prompt", ["def ", "class Reader:\n    ", "x = 1\n"])
def test_the_first_token_goes_on_from_the_white_space(tokenizer, prompt):
    ids = tokenizer.encode(prompt)
    begun = tokenizer.heal(ids, 4096)
    assert begun is not None
    assert begun.taken_back == ids[-1] and begun.allowed[ids[-1]]
    tail = tokenizer.decode(ids[-1:])
    for identifier in np.flatnonzero(begun.allowed)[:50].tolist():
        assert tokenizer.decode([identifier]).startswith(tail)
        stream = TextStream(tokenizer.decode, ids[:-1], begun=begun)
        text = stream.push(identifier) + stream.push(ids[0]) + stream.finish()
        assert prompt + text == tokenizer.decode([*ids[:-1], identifier, ids[0]])


@pytest.mark.parametrize("prompt", ["def name", " ", "value)"])
def test_other_prompts_are_left_alone(tokenizer, prompt):
    assert tokenizer.heal(tokenizer.encode(prompt), 4096) is None


def test_only_allowed_tokens_come_first():
    shards = make_shards(Decoder((None,)), make_manifest((None,)))
    plain = [piece.id for piece in generate(Session(shards), [3, 1], GenerateOptions(max_tokens=1))]
    allowed = np.ones(VOCAB, bool)
    allowed[plain[0]] = False
    healed = generate(
        Session(shards), [3, 1], GenerateOptions(max_tokens=1), begun=Begun(4, allowed)
    )
    assert [piece.id for piece in healed] != plain
