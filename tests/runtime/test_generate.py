"""Generation against a plain loop, text streaming against the tokenizers' own decoding of all ids
at once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ane_moe.errors import UserError
from ane_moe.loop.generation import GenerateOptions, generate
from ane_moe.loop.session import Session
from ane_moe.loop.tokenizer import TextStream
from tests.runtime.numpy_shards import VOCAB, Decoder, make_manifest, make_shards

WINDOWS = (None, 5)
PROMPT = [3, 1, 4, 1, 5]


def session_of(**options):
    return Session(make_shards(Decoder(WINDOWS), make_manifest(WINDOWS, **options)))


def letters(ids):
    return "".join(chr(ord("a") + i % 26) for i in ids)


def test_greedy_ids_are_those_of_a_plain_loop_over_whole_texts():
    decoder, ids = Decoder(WINDOWS), list(PROMPT)
    result_ids = _run(generate(session_of(), PROMPT, GenerateOptions(max_tokens=20))).ids
    for identifier in result_ids:
        logits = decoder.logits(ids)[-1]
        assert logits[identifier] >= logits.max() - 1e-2
        ids.append(identifier)
    assert len(result_ids) == 20


def test_a_seed_repeats_the_text_and_streams_what_the_result_holds():
    def run(seed):
        generation = generate(session_of(), PROMPT, GenerateOptions(20, 1.5, 0.95, seed), letters)
        streamed = "".join(piece.text for piece in generation)
        assert streamed == generation.result().text == letters(generation.result().ids)
        return streamed

    assert run(5) == run(5) != run(6)


def test_a_full_context_is_an_end_with_every_position_used():
    session = session_of(context=40)
    result = _run(generate(session, PROMPT, GenerateOptions(max_tokens=1000)))
    assert result.finish_reason == "context" and session.room == 0
    assert len(result.ids) == 40 - len(PROMPT) + 1  # the last one need not be taken in


def test_an_end_of_text_id_ends_without_text():
    greedy = _run(generate(session_of(), PROMPT, GenerateOptions(10))).ids
    session = session_of()
    object.__setattr__(session.manifest, "eos_ids", (greedy[3],))
    result = _run(generate(session, PROMPT, GenerateOptions(10), letters))
    first = greedy.index(greedy[3])
    assert (result.ids, result.finish_reason) == (greedy[: first + 1], "eos")
    assert result.text == letters(greedy[:first])


@given(at=st.integers(0, 12), size=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_a_stop_string_ends_the_text_before_itself(at, size):
    whole = _run(generate(session_of(), PROMPT, GenerateOptions(20, 1.0, 1.0, 1), letters)).text
    stop = whole[at : at + size]
    generation = generate(
        session_of(), PROMPT, GenerateOptions(20, 1.0, 1.0, 1, (stop, "never")), letters
    )
    streamed = "".join(piece.text for piece in generation)
    assert streamed == generation.result().text == whole[: whole.index(stop)]
    assert generation.result().finish_reason == "stop"


def test_a_generation_left_halfway_says_what_it_has():
    generation = generate(session_of(), PROMPT, GenerateOptions(20), letters)
    pieces = [next(iter(generation)) for _ in range(3)]
    result = generation.result()
    assert result.finish_reason == "interrupted"
    assert result.ids == [piece.id for piece in pieces] and result.figures.decode.tokens == 2


@pytest.mark.parametrize(
    "options, message",
    [
        (GenerateOptions(max_tokens=0), "max-tokens"),
        (GenerateOptions(stop=("",)), "empty"),
        (GenerateOptions(stop=("x",)), "need a tokenizer"),
        (GenerateOptions(temperature=-1), "temperature"),
    ],
)
def test_senseless_options_are_refused_before_any_call(options, message):
    session = session_of()
    with pytest.raises(UserError, match=message):
        generate(session, PROMPT, options)
    assert session.figures.prefill.calls == 0


@pytest.mark.parametrize(
    "prompt, message", [([], "no tokens"), ([VOCAB], "vocabulary"), ([1] * 41, "context")]
)
def test_prompts_that_cannot_be_taken_in_are_refused(prompt, message):
    with pytest.raises(UserError, match=message):
        next(iter(generate(session_of(), prompt)))


@pytest.fixture(scope="module")
def byte_level():
    """Byte-level BPE in which most characters outside ASCII are several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        ["the cat sat on the mat, été"] * 3,
        trainers.BpeTrainer(
            vocab_size=300,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


@pytest.fixture(scope="module")
def byte_fallback():
    """Metaspace with byte fallback, as Llama-like tokenizers decode."""
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    vocabulary |= {
        token: 257 + index for index, token in enumerate(["▁", "▁the", "▁cat", "a", "b", "é"])
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def _streamed(decode, ids, prompt=(), stop=()):
    stream = TextStream(decode, prompt, stop)
    pieces = [stream.push(identifier) for identifier in ids]
    return [*pieces, stream.finish()], stream


@given(text=st.text(alphabet="the cat,日本語é🙂👩‍🚀\n ", max_size=40))
@settings(max_examples=100, deadline=None)
def test_streamed_text_is_the_whole_text_and_never_half_a_character(byte_level, text):
    pieces, _ = _streamed(byte_level.decode, byte_level.encode(text).ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@given(ids=st.lists(st.integers(0, 255), max_size=20))
@settings(max_examples=100, deadline=None)
def test_ids_that_are_no_valid_text_still_stream_to_the_whole_decoding(byte_level, ids):
    assert "".join(_streamed(byte_level.decode, ids)[0]) == byte_level.decode(ids)


@given(
    text=st.text(alphabet="ab日é🙂", max_size=20),
    words=st.lists(st.sampled_from(["▁the", "▁cat"]), max_size=5),
)
@settings(max_examples=50, deadline=None)
def test_leading_spaces_and_byte_fallback_survive_streaming(byte_fallback, text, words):
    ids = [byte_fallback.token_to_id(word) for word in words] + [byte + 1 for byte in text.encode()]
    prompt = [byte_fallback.token_to_id("▁the")]
    assert (
        "".join(_streamed(byte_fallback.decode, ids, prompt)[0])
        == byte_fallback.decode(prompt + ids)[len("the") :]
    )


def test_text_that_only_looks_like_a_stop_string_is_given_out_in_the_end():
    pieces, stream = _streamed(letters, [0, 1, 2, 0, 1], stop=["abd"])
    assert pieces == ["", "", "abc", "", "", "ab"] and not stream.stopped


def test_temperature_zero_ignores_the_seed():
    one, other = (
        _run(generate(session_of(), PROMPT, GenerateOptions(10, seed=seed))).ids for seed in (1, 2)
    )
    np.testing.assert_array_equal(one, other)


def _run(generation):
    for _ in generation:
        pass
    return generation.result()
