"""Sequences cut back and gone on from: what comes is what a session that began anew gives."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ane_moe.loop.buffers import Slots
from ane_moe.loop.cuts import Cuts, Ring, cuts_of
from ane_moe.loop.session import Halted, Session
from ane_moe.loop.shards import load_shards
from ane_moe.model.port import Port
from tests.models import make_model, make_variant, save_checkpoint
from tests.runtime.numpy_shards import VOCAB, Decoder, make_manifest, make_shards
from tests.slow_set import slow_but
from tests.verification.tiny import tiny_conversion

CLOSE = 0.05  # fp16 activations against fp64, on logits of about unit variance
ALIKE = 0.02  # the same in calls of other lengths, by the reference runtime
WINDOW, TOKENS, SLOTS = 5, 4, 9


def ids_of(count: int, seed: int, vocab: int = VOCAB) -> list[int]:
    return np.random.default_rng(seed).integers(3, vocab, count).tolist()


@given(
    first=st.integers(1, 30),
    kept=st.integers(0, 30),
    rest=st.integers(1, 10),
    windows=st.lists(st.sampled_from([None, 1, 4, 33]), min_size=1, max_size=2),
    state=st.sampled_from(["mlstate", "explicit"]),
)
@settings(max_examples=40, deadline=None)
def test_what_follows_a_cut_is_what_a_whole_text_gives(first, kept, rest, windows, state) -> None:
    decoder = Decoder(tuple(windows))
    session = Session(make_shards(decoder, make_manifest(tuple(windows), state=state)))
    session.prefill(ids_of(first, 1))
    assert session.cut(kept) == session.position == min(kept, first)
    text = [*ids_of(first, 1)[: session.position], *ids_of(rest, 2)]
    logits = session.prefill(ids_of(rest, 2))
    np.testing.assert_allclose(logits, decoder.logits(text)[-1], atol=CLOSE)


@pytest.mark.parametrize("one_way", [False, True])
def test_a_failure_forgets_what_cannot_be_written_over(one_way: bool) -> None:
    session = Session(make_shards(Decoder((None,)), make_manifest((None,))))
    session._one_way = one_way
    session.prefill([3, 4, 5])
    call = session._decode.body.steps[-1]
    object.__setattr__(call.function, "call", lambda inputs, state: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        session.decode(6)
    assert session.position == session.reusable(3) == (0 if one_way else 3)


@given(steps=st.lists(st.tuples(st.integers(0, 12), st.integers(1, TOKENS)), max_size=20))
@settings(max_examples=200, deadline=None)
def test_a_ring_is_cut_where_all_that_is_seen_is_still_there(steps) -> None:
    """Each slot holds a position and the number of the cut since which it is true."""
    slots = Slots({})
    ports = {"mask": (1, 1, TOKENS, SLOTS), "write": (1, 1, TOKENS, SLOTS)}
    names = {"mask": f"mask.{WINDOW}.ring_{SLOTS}", "write": f"write.ring_{SLOTS}"}
    given_ = {name: slots.array(Port("p", shape, names[name])) for name, shape in ports.items()}
    cuts = Cuts(True, frozenset({Ring(SLOTS, WINDOW)}), False)
    held, text, furthest, position = [None] * SLOTS, [], 0, 0
    for number, (back, count) in enumerate(steps):
        position = cuts.place(max(0, position - back), furthest, None)
        furthest = furthest if position else 0
        text = text[:position] + [(position + token, number) for token in range(count)]
        slots.place(position, count)
        for token in range(count):
            slot = int(np.flatnonzero(given_["write"][0, 0, token])[0])
            held[slot] = text[position + token]
        for token in range(count):
            seen = {held[slot] for slot in np.flatnonzero(given_["mask"][0, 0, token] == 0)}
            own = position + token
            assert seen == set(text[max(0, own + 1 - WINDOW) : own + 1])
        position += count
        furthest = max(furthest, position)


def test_a_ring_is_cut_no_less_than_it_could_be() -> None:
    ring = Ring(SLOTS, WINDOW)
    assert ring.allows(1, SLOTS) and not ring.allows(1, SLOTS + 4)
    # Of 20 tokens 11 to 19 are there; token number 15, the 16th, sees 11 to 15.
    assert ring.allows(15, 20) and not ring.allows(14, 20)


MODELS = {
    "qwen3_next": (lambda: make_model("qwen3_next"), {}),  # a gated delta net beside attention
    "lfm2_moe": (lambda: make_model("lfm2_moe"), {"layers_per_shard": 4}),
    "minimax": (lambda: make_model("minimax"), {"layers_per_shard": 2, "prefill": 0}),
    "zaya": (lambda: make_model("zaya"), {}),
    "deepseek_v3": (lambda: make_model("deepseek_v3"), {}),
    "ringed": (lambda: make_variant("mixtral tied with windows"), {"ring_caches": True}),
    "unlimited_ocr": (lambda: make_model("unlimited_ocr"), {}),
}
ANYWHERE = ("deepseek_v3", "ringed", "unlimited_ocr")
ALWAYS = ("qwen3_next", "deepseek_v3", "ringed")


@pytest.fixture(scope="module", params=slow_but(ALWAYS, MODELS))
def converted(request, tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("cuts")
    make, options = MODELS[request.param]
    checkpoint = save_checkpoint(make(), folder / "checkpoint")
    out = tiny_conversion(checkpoint, folder / "out", **{"prefill": 16, "context": 96} | options)
    return request.param, load_shards(out, "reference")


def differences(shards, first: int, generated: int, kept: int, forced: bool = False):
    """How far logits of a text are from a fresh session's, where they come after a cut, and after
    how many tokens that was."""
    ids, rest = ids_of(first + generated, 1, 200), ids_of(7, 2, 200)
    session, fresh = Session(shards), Session(shards)
    session.prefill(ids[:first])
    for identifier in ids[first:]:
        session.decode(identifier)
    if forced:
        session._cuts = Cuts(True, frozenset(), False)
    place = session.cut(kept)
    text = [*ids[:place], *rest]
    return np.abs(session.prefill(text[place:]) - fresh.prefill(text)).max(), place


def test_each_model_is_cut_where_its_states_allow_it(converted) -> None:
    name, shards = converted
    assert cuts_of(shards.manifest).anywhere == (name in ANYWHERE)
    difference, place = differences(shards, 20, 0, 12)
    assert difference < ALIKE and place == (12 if name in ANYWHERE else 0)
    difference, place = differences(shards, 50, 10, 60)  # nothing is cut
    assert difference < ALIKE and place == (50 if name == "unlimited_ocr" else 60)
    difference, place = differences(shards, 50, 10, 30)
    assert difference < ALIKE and place == (30 if name in ("deepseek_v3", "unlimited_ocr") else 0)


def test_a_cut_that_is_not_allowed_would_be_seen(converted) -> None:
    name, shards = converted
    if name == "deepseek_v3":
        pytest.skip("allows all of them")
    # Prompt windows: what was generated has seen less than a prompt's tokens.
    kept = 60 if name == "unlimited_ocr" else 30
    difference, place = differences(shards, 50, 10, kept, forced=True)
    assert place == kept and difference > 1.5 * ALIKE


def test_a_prompt_can_be_left_halfway(converted) -> None:
    _, shards = converted
    session, fresh, ids = Session(shards), Session(shards), ids_of(60, 3, 200)
    calls = iter([False, False, True])
    session.halted = lambda: next(calls)
    with pytest.raises(Halted):
        session.prefill(ids)
    session.halted = lambda: False
    assert 0 < session.position < 60
    taken = session.cut(session.position)
    assert np.abs(session.prefill(ids[taken:]) - fresh.prefill(ids)).max() < ALIKE


def test_stacks_without_calls_of_several_tokens_are_not_trusted() -> None:
    manifest = make_manifest((None,), prefill=0)
    assert cuts_of(manifest).anywhere
    stacked = tuple(replace(shard, layers=(0,)) for shard in manifest.shards)
    assert not cuts_of(replace(manifest, shards=stacked)).anywhere
