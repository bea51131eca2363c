"""Self-speculative decoding: what is generated is what the whole model chooses, whatever the drafts
are."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ane_moe.early_adapters import Adapter, Adapters, read_adapters, write_adapters
from ane_moe.errors import UserError
from ane_moe.loop.generation import GenerateOptions, generate
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from ane_moe.loop.speculation import SpeculationOptions, SpeculativeSession
from tests.models import save_checkpoint
from tests.verification.tiny import tiny_conversion, tiny_model

PROMPT = [5, 9, 4, 17, 30, 2, 11]
NEW = 24


@pytest.fixture(scope="module", params=["masked", "sparse"])
def shards(request, tmp_path_factory):
    model = tiny_model("qwen3_moe", num_hidden_layers=3, max_position_embeddings=64)
    folder = tmp_path_factory.mktemp("drafts")
    checkpoint = save_checkpoint(model, folder / "checkpoint")
    options = {"expert_tokens": (1, 8)} if request.param == "sparse" else {}
    out = tiny_conversion(checkpoint, folder / "out", routing=request.param, prefill=8, **options)
    return load_shards(out, "reference")


def greedy(session, count=NEW, options=None):
    generation = generate(session, PROMPT, options or GenerateOptions(max_tokens=count))
    for _ in generation:
        pass
    return generation.result()


@pytest.fixture(scope="module")
def expected(shards):
    return greedy(Session(shards)).ids


def poisoned(session, draws):
    """Drafts of any tokens, in place of the first layers' own."""
    session._draft = lambda identifier, count, clock: draws(count)
    return session


@given(seed=st.integers(0, 10**6), drafts=st.integers(1, 7), right=st.floats(0, 1))
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_drafts_leave_the_greedy_text_as_it_is(shards, expected, seed, drafts, right):
    random = np.random.default_rng(seed)
    session = SpeculativeSession(shards, SpeculationOptions(drafts, 0))

    def draws(count):
        """Some of them what will follow, so that they are accepted."""
        first = session.position - len(PROMPT) + 1
        following = [*expected, *([0] * 99)][first : first + count]
        any_token = random.integers(0, shards.manifest.vocab, count).tolist()
        keep = random.random(count) < right
        return [a if k else b for a, b, k in zip(following, any_token, keep, strict=True)]

    assert greedy(poisoned(session, draws)).ids == expected
    figures = session.figures.speculation
    assert figures.accepted + figures.rounds == session.figures.decode.tokens


@pytest.mark.parametrize("layer", [None, 0, 1])
def test_drafts_of_the_first_layers_leave_the_text_as_it_is(shards, expected, layer):
    session = SpeculativeSession(shards, SpeculationOptions(3, layer))
    assert greedy(session).ids == expected
    assert session.figures.speculation.exit_layer == (layer or 0)


def test_right_drafts_are_all_accepted_and_take_one_call_of_the_model(shards, expected):
    session = SpeculativeSession(shards, SpeculationOptions(7, 0))

    def draws(count):
        first = session.position - len(PROMPT) + 1
        return [*expected, *([0] * 99)][first : first + count]

    assert greedy(poisoned(session, draws)).ids == expected
    figures = session.figures.speculation
    assert figures.rounds == 3 and figures.tokens_per_round > 7  # 23 decoded tokens, 8 a round
    plain = Session(shards)
    greedy(plain)
    assert session.figures.decode.calls_per_token < plain.figures.decode.calls_per_token / 2


def test_an_adapter_that_leads_astray_changes_drafts_and_not_the_text(shards, expected):
    width = shards.manifest.d_model
    random = np.random.default_rng(1)
    wild = Adapter(
        *(random.normal(0, 9, shape).astype(np.float32) for shape in ((width, 4), (4, width)))
    )
    session = SpeculativeSession(shards, SpeculationOptions(4, 1), Adapters(width, exits={1: wild}))
    assert greedy(session).ids == expected


def test_the_context_is_filled_to_its_end_as_without_drafts(shards):
    count = shards.manifest.context
    plain = greedy(Session(shards), count)
    session = SpeculativeSession(shards, SpeculationOptions(5, 0))
    assert greedy(session, count).ids == plain.ids
    assert session.room == 0


def test_a_sampler_draws_from_the_same_logits(shards):
    options = GenerateOptions(max_tokens=NEW, temperature=1.5, seed=3)
    session = SpeculativeSession(shards, SpeculationOptions(4, 0))
    assert greedy(session, options=options).ids == greedy(Session(shards), options=options).ids


def test_a_session_begins_anew_without_what_was_checked_before(shards, expected):
    session = SpeculativeSession(shards, SpeculationOptions(7, 0))
    greedy(session, 5)
    session.reset()
    assert greedy(session).ids == expected


@pytest.mark.parametrize("options", [(0, None), (8, None), (3, 2), (3, 9)])
def test_impossible_drafts_are_refused(shards, options):
    with pytest.raises(UserError):
        SpeculativeSession(shards, SpeculationOptions(*options))


def test_adapters_of_another_layer_are_refused(shards):
    with pytest.raises(UserError, match="hold none for layer 1"):
        SpeculativeSession(shards, SpeculationOptions(3, 1), Adapters(shards.manifest.d_model))


def test_adapters_read_back_as_written_and_damaged_ones_are_named(tmp_path):
    random = np.random.default_rng(0)
    down, up = random.normal(size=(6, 2)), random.normal(size=(2, 6))
    one = Adapter(down.astype(np.float32), up.astype(np.float32))
    adapters = Adapters(6, {(0, 2): one, (3, 1): one}, {1: one})
    write_adapters(adapters, tmp_path / "a.npz")
    found = read_adapters(tmp_path / "a.npz", 6)
    assert found.ahead.keys() == adapters.ahead.keys() and found.exits.keys() == {1}
    np.testing.assert_array_equal(found.ahead[0, 2].down, one.down)
    h = random.normal(size=(5, 6))
    level = h / np.sqrt((h**2).mean(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(one(h), level + level @ down @ up, rtol=1e-5)
    wrong = [
        replace(one, up=one.up[:1]),
        replace(one, down=one.down.astype(np.float64)),
        replace(one, up=one.up * np.nan),
        replace(one, up=one.up[:0], down=one.down[:, :0]),
    ]
    for number, damaged in enumerate(wrong):
        write_adapters(Adapters(6, exits={0: damaged}), tmp_path / f"{number}.npz")
        with pytest.raises(UserError, match="cannot be read as adapters"):
            read_adapters(tmp_path / f"{number}.npz", 6)
    with pytest.raises(UserError, match=r"found: for hidden states of 6 channels; this .* have 7"):
        read_adapters(tmp_path / "a.npz", 7)
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(UserError):
        read_adapters(tmp_path / "text.npz", 6)
