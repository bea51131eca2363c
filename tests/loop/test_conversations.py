"""Conversations kept in caches: what is taken in again, and that it changes no answer."""

import numpy as np
import pytest

from ane_moe.errors import UserError
from ane_moe.loop.conversations import Conversations, common_prefix
from ane_moe.loop.generation import GenerateOptions, generate
from ane_moe.loop.messages import ChatForm, Message, transcript
from ane_moe.loop.sampling import token_scores
from ane_moe.loop.session import Session
from tests.runtime.numpy_shards import VOCAB, Decoder, make_manifest, make_shards

SIX = GenerateOptions(max_tokens=6)


@pytest.fixture(scope="module")
def shards():
    return make_shards(Decoder((None, 4)), make_manifest((None, 4), context=64))


def ids_of(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, count).tolist()


def run(conversations, ids):
    """New ids, and how many of the prompt's were in a cache."""
    generation, taken = conversations.generate(ids, SIX)
    return [piece.id for piece in generation], taken


def fresh(shards, ids):
    return [piece.id for piece in generate(Session(shards), ids, SIX)]


def test_the_next_turn_takes_in_what_is_new_alone(shards) -> None:
    conversations, ids = Conversations(shards), ids_of(10, 0)
    new, taken = run(conversations, ids)
    assert taken == 0 and new == fresh(shards, ids)
    longer = [*ids, *new, *ids_of(5, 1)]
    before = conversations.figures.prefill.tokens
    answer, taken = run(conversations, longer)
    assert taken == 15  # the last new token had not been taken in
    assert conversations.figures.prefill.tokens - before == len(longer) - taken
    assert answer == fresh(shards, longer)


def test_the_same_prompt_again_takes_in_its_last_token(shards) -> None:
    conversations, ids = Conversations(shards), ids_of(10, 0)
    assert run(conversations, ids)[0] == run(conversations, ids)[0]
    assert run(conversations, ids)[1] == 9


def test_each_of_two_conversations_goes_on_in_its_own_cache(shards) -> None:
    conversations = Conversations(shards, 2)
    texts = {seed: [7, *ids_of(10, seed)] for seed in (1, 2)}  # alike in their first token
    for turn in range(3):
        for seed, ids in texts.items():
            new, taken = run(conversations, ids)
            assert new == fresh(shards, ids)
            assert taken == (0 if turn == 0 else len(ids) - 2 - 1)
            texts[seed] = [*ids, *new, 3, 4]
    run(conversations, ids_of(4, 9))  # takes the place of the first
    assert [run(conversations, texts[seed])[1] for seed in (2, 1)] == [len(texts[2]) - 3, 0]


def test_a_halted_prompt_and_a_failed_call_leave_what_is_true(shards) -> None:
    conversations, ids = Conversations(shards), ids_of(30, 0)
    calls = iter([False, True])
    generation, _ = conversations.generate(ids, SIX, halted=lambda: next(calls))
    assert [*generation] == [] and generation.result().finish_reason == "interrupted"
    answer, taken = run(conversations, ids)
    assert taken == 8 and answer == fresh(shards, ids)
    with pytest.raises(UserError, match="vocabulary"):
        run(conversations, [*ids, VOCAB])
    assert run(conversations, ids)[0] == answer


def test_clearing_forgets_all(shards) -> None:
    conversations, ids = Conversations(shards), ids_of(10, 0)
    run(conversations, ids)
    conversations.clear()
    assert run(conversations, ids)[1] == 0
    with pytest.raises(UserError, match="at least one"):
        Conversations(shards, 0)


@pytest.mark.parametrize(
    "one, other, alike", [("", "ab", 0), ("ab", "ab", 2), ("abc", "abd", 2), ("ab", "abc", 2)]
)
def test_a_common_prefix(one, other, alike) -> None:
    assert common_prefix([*map(ord, one)], [*map(ord, other)]) == alike


def test_pieces_have_the_scores_of_what_they_were_picked_from(shards) -> None:
    ids = ids_of(5, 0)
    pieces = [*generate(Session(shards), ids, GenerateOptions(4, top_logprobs=3))]
    session, logits = Session(shards), None
    for piece in pieces:
        logits = session.prefill(ids) if logits is None else session.decode(ids[-1])
        scores = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
        order = np.argsort(-scores, kind="stable")[:3]
        assert [token for token, _ in piece.scores.top] == order.tolist()
        np.testing.assert_allclose([value for _, value in piece.scores.top], scores[order])
        assert piece.scores.logprob == pytest.approx(scores[piece.id])
        ids = [piece.id]


def test_scores_of_equal_logits_go_to_the_lowest_ids() -> None:
    logits = np.array([1, 2, 2, -np.inf, 2], np.float32)
    assert [token for token, _ in token_scores(logits, 1, 2).top] == [1, 2]
    assert len(token_scores(logits, 1, 9).top) == 5 and token_scores(logits, 1, 0).top == ()
    assert token_scores(logits, 3, 0).logprob == -np.inf


class Letters:
    """A tokenizer of one id a character, with or without a template."""

    def __init__(self, has_chat_template: bool) -> None:
        self.has_chat_template = has_chat_template

    def encode(self, text):
        return [*map(ord, text)]

    def encode_messages(self, messages):
        return self.encode("".join(f"<{one['role']}>{one['content']}" for one in messages))


MESSAGES = [Message("system", "Be brief."), Message("user", "Hi "), Message("assistant", " Hello")]


def test_messages_go_into_the_template_or_a_plain_transcript() -> None:
    form = ChatForm(Letters(True))
    assert not form.is_plain and form.stop == ()
    assert "".join(map(chr, form.encode(MESSAGES[:2]))) == "<system>Be brief.<user>Hi "
    plain = ChatForm(Letters(False))
    assert plain.is_plain and plain.stop == ("\nUser:",)
    begun = transcript(MESSAGES[:2])
    assert begun == "Be brief.\n\nUser: Hi\nAssistant:"
    assert "".join(map(chr, plain.encode(MESSAGES[:2]))) == begun
    assert transcript([*MESSAGES, Message("user", "Bye")]).startswith(f"{begun} Hello\nUser: Bye")
