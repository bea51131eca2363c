"""Adapters against the regression they are, and guesses against counts by hand."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from ane_moe.cli import app
from ane_moe.errors import UserError
from ane_moe.loop.adapters import levelled, read_adapters
from ane_moe.loop.prefetch import Guessing
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from ane_moe.routing.alignment import RIDGE, align, fit_adapter, recall
from ane_moe.routing.residuals import record_residuals
from tests.models import save_checkpoint
from tests.verification.tiny import tiny_conversion, tiny_model

PROMPTS = [np.random.default_rng(n).integers(3, 60, 30).tolist() for n in range(9)]


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    model = tiny_model("qwen3_moe", num_hidden_layers=3, max_position_embeddings=128)
    folder = tmp_path_factory.mktemp("aligned")
    checkpoint = save_checkpoint(model, folder / "checkpoint")
    return tiny_conversion(
        checkpoint, folder / "out", routing="sparse", prefill=8, expert_tokens=(1, 8)
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "prompts.json"
    path.write_text(json.dumps(PROMPTS))
    return path


def test_a_full_rank_adapter_is_the_ridge_regression_and_a_lower_one_its_best_part():
    random = np.random.default_rng(0)
    x = random.normal(size=(300, 12))
    y = x + x @ random.normal(size=(12, 12)) / 3 + random.normal(size=(300, 12)) / 9
    a, b = levelled(x).astype(float), levelled(y).astype(float)
    stacked = np.vstack([a, np.sqrt(RIDGE * 300) * np.eye(12)])  # the ridge as more rows
    best, *_ = np.linalg.lstsq(stacked, np.vstack([b - a, np.zeros((12, 12))]), rcond=None)
    np.testing.assert_allclose(fit_adapter(x, y, 12)(x), a + a @ best, atol=1e-4)
    left, values, right = np.linalg.svd(a @ best, full_matrices=False)
    for rank in (1, 4, 8):
        adapter = fit_adapter(x, y, rank)
        cut = (left[:, :rank] * values[:rank]) @ right[:rank]  # Eckart and Young
        np.testing.assert_allclose(adapter(x) - a, cut, atol=1e-4)
        assert adapter.down.shape == (12, rank)


def test_recall_by_hand():
    scores = np.array([[3, 2, 1, 0], [0, 1, 2, 3]])
    chosen = np.array([[1, 0, 1, 0], [1, 1, 0, 0]], bool)
    assert recall(scores, chosen, 2) == 1 / 4
    assert recall(scores, chosen, 3) == 3 / 4


def test_hidden_states_are_those_of_the_layers(sparse):
    """What enters a layer's experts and what they add is what leaves; chosen are the gates'."""
    shards = load_shards(sparse, "reference")
    heard = record_residuals(shards, PROMPTS[:3])
    assert list(heard.entering) == list(heard.leaving) == [0, 1, 2]
    session = Session(shards)
    rows = []
    for passage in PROMPTS[:3]:
        session.reset()
        for first in range(0, len(passage), 8):
            session.prefill(passage[first : first + 8])
            rows.append(session.slot("stream").T.copy())
    np.testing.assert_array_equal(heard.leaving[2], np.concatenate(rows))
    assert all((chosen.sum(1) == 2).all() for chosen in heard.chosen.values())
    assert not np.array_equal(heard.entering[1], heard.leaving[0])  # attention lies between


def test_align_guesses_and_its_adapters_load_without_changing_a_bit(sparse, text, tmp_path):
    arguments = ["align", sparse, "--text", text, "--out", tmp_path / "a.npz", "--rank", 6]
    arguments += ["--distances", "1,2", "--runtime", "reference"]
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    document = json.loads(result.stdout)
    assert document["tokens_fitted"] == 180 and document["tokens_left_out"] == 90
    kinds = {(one["predictor"], one["distance"]) for one in document["means"]}
    assert kinds == {
        (name, far) for name in ("static", "previous", "router", "adapter") for far in (1, 2)
    }
    assert all(0 <= one["recall_at_k"] <= one["recall_at_2k"] <= 1 for one in document["means"])
    assert document["exits"].keys() == {"0", "1"}
    adapters = read_adapters(tmp_path / "a.npz", 24)
    assert adapters.ahead.keys() == {(0, 1), (1, 1), (0, 2)}
    plain = Session(load_shards(sparse, "reference")).prefill_logits(PROMPTS[0], by="decode")
    for ahead in (1, 2):
        shards = load_shards(sparse, "reference", expert_cache_bytes=5 * 2 * 3 * 24 * 24)
        session = Session(shards, predictor=Guessing("adapter", ahead, adapters))
        found = session.prefill_logits(PROMPTS[0], by="decode")
        np.testing.assert_array_equal(found, plain)
        assert session.figures.prefetch.needed > 100
    assert "adapted" in CliRunner().invoke(app, [*map(str, arguments)]).stdout


@pytest.mark.parametrize("predictor", ["static", "previous", "layer", "router"])
@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_guesses_from_any_distance_change_no_bit(sparse, predictor, ahead):
    plain = Session(load_shards(sparse, "reference")).prefill_logits(PROMPTS[1], by="decode")
    shards = load_shards(sparse, "reference", expert_cache_bytes=4 * 2 * 3 * 24 * 24)
    session = Session(shards, predictor=Guessing(predictor, ahead), concurrency=2)
    np.testing.assert_array_equal(session.prefill_logits(PROMPTS[1], by="decode"), plain)
    cache = session.figures.cache
    assert cache.hits + cache.late + cache.misses == len(PROMPTS[1]) * 3 * 2


def test_what_cannot_be_fitted_or_guessed_is_refused(sparse, text):
    for wrong in ({"rank": 0}, {"distances": (0,)}, {"max_tokens": 10}):
        with pytest.raises(UserError):
            align(sparse, text, runtime="reference", **wrong)
    shards = load_shards(sparse, "reference")
    with pytest.raises(UserError, match="no adapters"):
        Session(shards, predictor="adapter")
    with pytest.raises(UserError, match="layers ahead"):
        Session(shards, predictor=Guessing("previous", 9))


def test_a_rule_that_withholds_guesses_changes_no_bit(sparse):
    plain = Session(load_shards(sparse, "reference")).prefill_logits(PROMPTS[2], by="decode")
    withheld = {}
    for contention in (0.0, 1e6):
        shards = load_shards(sparse, "reference", expert_cache_bytes=4 * 2 * 3 * 24 * 24)
        how = Guessing("previous", only_if_it_pays=True, contention=contention)
        session = Session(shards, predictor=how)
        np.testing.assert_array_equal(session.prefill_logits(PROMPTS[2], by="decode"), plain)
        withheld[contention] = session.figures.prefetch.withheld
    assert withheld[1e6] > 40  # of 90 layers, of which 32 are for learning
