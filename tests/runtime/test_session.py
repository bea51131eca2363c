"""Session against the same decoder computed over the whole text at once, without a cache."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ane_moe.errors import UserError
from ane_moe.loop.session import Session
from tests.runtime.numpy_shards import VOCAB, Decoder, make_manifest, make_shards

TOLERANCE = 0.05  # fp16 activations against fp64, on logits of about unit variance


def session_of(windows=(None, 4), **options):
    decoder = Decoder(windows)
    return decoder, Session(make_shards(decoder, make_manifest(windows, **options)))


def tokens(count, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, count).tolist()


@given(
    length=st.integers(1, 40),
    prefill=st.sampled_from([0, 1, 8, 16, 64]),
    state=st.sampled_from(["mlstate", "explicit"]),
    layout=st.sampled_from(["bc1s", "bct1"]),
    parts=st.integers(1, 3),
    windows=st.lists(st.sampled_from([None, 1, 4, 33, 99]), min_size=1, max_size=3),
    by=st.sampled_from(["prefill", "decode"]),
)
@settings(max_examples=60, deadline=None)
def test_logits_of_every_position_equal_those_without_a_cache(
    length, prefill, state, layout, parts, windows, by
):
    decoder, session = session_of(
        tuple(windows), prefill=prefill, state=state, layout=layout, parts=parts
    )
    ids = tokens(length)
    logits = session.prefill_logits(ids, by=by)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, decoder.logits(ids), atol=TOLERANCE)
    assert session.position == length


@given(
    pieces=st.lists(st.integers(1, 20), min_size=1, max_size=4).filter(lambda p: sum(p) <= 40),
    state=st.sampled_from(["mlstate", "explicit"]),
)
@settings(max_examples=25, deadline=None)
def test_prefill_and_decode_may_alternate_in_any_pieces(pieces, state):
    decoder, session = session_of(state=state)
    ids = tokens(sum(pieces))
    taken = 0
    for count in pieces:
        piece = ids[taken : taken + count]
        last = session.decode(piece[0]) if count == 1 else session.prefill(piece)
        taken += count
        np.testing.assert_allclose(last, decoder.logits(ids[:taken])[-1], atol=TOLERANCE)


@pytest.mark.parametrize("state", ["mlstate", "explicit"])
def test_sessions_over_the_same_shards_keep_apart(state):
    decoder = Decoder((None, None))
    shards = make_shards(decoder, make_manifest((None, None), state=state))
    one, other = Session(shards), Session(shards)
    a, b = tokens(20, 1), tokens(20, 2)
    one.prefill(a[:10])
    other.prefill(b[:5])
    for index in range(10, 20):
        np.testing.assert_allclose(
            one.decode(a[index]), decoder.logits(a[: index + 1])[-1], atol=TOLERANCE
        )
        np.testing.assert_allclose(
            other.decode(b[index - 5]), decoder.logits(b[: index - 4])[-1], atol=TOLERANCE
        )


@pytest.mark.parametrize("state", ["mlstate", "explicit"])
def test_a_reset_session_starts_as_a_new_one(state):
    _, session = session_of(state=state)
    first = session.prefill(tokens(11)).copy()
    session.prefill(tokens(9, 1))
    session.reset()
    assert session.position == 0
    np.testing.assert_array_equal(session.prefill(tokens(11)), first)


def test_a_text_may_fill_the_context_exactly_and_no_more():
    decoder, session = session_of()
    ids = tokens(41)
    session.prefill(ids[:39])
    np.testing.assert_allclose(
        session.decode(ids[39]), decoder.logits(ids[:40])[-1], atol=TOLERANCE
    )
    assert session.room == 0
    with pytest.raises(UserError, match="do not fit into the context"):
        session.decode(ids[40])
    with pytest.raises(UserError, match="do not fit into the context"):
        session_of()[1].prefill(ids)


@pytest.mark.parametrize("bad", [-1, VOCAB, 10**6])
def test_ids_outside_the_vocabulary_are_refused_before_anything_runs(bad):
    _, session = session_of()
    for take in (session.prefill, session.prefill_logits):
        with pytest.raises(UserError, match="outside the vocabulary"):
            take([1, 2, bad])
    with pytest.raises(UserError, match="outside the vocabulary"):
        session.decode(bad)
    assert session.position == 0 and session.figures.prefill.calls == 0


def test_an_empty_prompt_is_refused():
    with pytest.raises(UserError, match="no tokens"):
        session_of()[1].prefill([])


def test_figures_count_every_call_by_kind():
    _, session = session_of(parts=2)
    session.prefill(tokens(11))
    session.decode(3)
    session.decode(4)
    prefill, decode = session.figures.prefill, session.figures.decode
    assert (prefill.tokens, decode.tokens) == (11, 2)
    assert {kind: figures.calls for kind, figures in prefill.kinds.items()} == {
        "attn": 4,
        "moe": 8,
        "lm_head": 2,
    }
    assert {kind: figures.calls for kind, figures in decode.kinds.items()} == {
        "attn": 4,
        "moe": 8,
        "lm_head": 4,
    }
    assert decode.calls_per_token == 8
    for phase in (prefill, decode):
        assert 0 < phase.shard_seconds <= phase.seconds
        assert phase.host_seconds == pytest.approx(phase.seconds - phase.shard_seconds)


def test_inputs_of_a_call_are_the_same_arrays_every_time():
    _, session = session_of()
    call = session._decode.body.calls[0]
    before = {name: id(array) for name, array in call.features.items()}
    session.prefill(tokens(9))
    session.decode(1)
    session.decode(2)
    assert {name: id(array) for name, array in call.features.items()} == before


def test_returned_logits_cannot_be_written_by_accident():
    _, session = session_of()
    with pytest.raises(ValueError):
        session.decode(1)[0] = 0
