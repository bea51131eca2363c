"""Adapters against the regression they are, and guesses against counts by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from ane_moe.cli import app
from ane_moe.early_adapters import levelled, read_adapters, write_adapters
from ane_moe.errors import UserError
from ane_moe.loop.prefetch import Guessing
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from ane_moe.routing.alignment import RIDGE, align, fit_adapter, recall
from ane_moe.routing.cache_study import guessed
from ane_moe.routing.heard import hear
from ane_moe.routing.recorder import record
from ane_moe.routing.residuals import record_residuals
from ane_moe.routing.routing_trace import read_trace, write_trace
from ane_moe.routing.traffic import function_calls
from tests.models import save_checkpoint
from tests.slow_set import slow_but
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
@pytest.mark.parametrize("ahead", slow_but([2], [1, 2, 3]))
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


def test_a_cache_study_guesses_by_hidden_states_as_a_session_does(sparse, text, tmp_path):
    found = align(sparse, text, rank=6, distances=(1,), runtime="reference")
    write_adapters(found.adapters, tmp_path / "a.npz")
    write_trace(record(sparse, text, max_tokens=60, runtime="reference"), tmp_path / "t.npz")
    trace = read_trace(tmp_path / "t.npz")
    calls = function_calls(trace)
    heard = hear(trace, sparse, tmp_path / "a.npz", runtime="reference")
    assert heard.predictors.keys() == {"router", "adapter"}
    for name, predictor in heard.predictors.items():
        how = Guessing(name, adapters=found.adapters if name == "adapter" else None)
        session = Session(load_shards(sparse, "reference"), predictor=how)
        for passage in trace.passages:
            session.reset()
            for token in trace.tokens[passage].tolist():
                session.decode(token)
        guesses = guessed(calls, predictor, heard.entering)
        right = sum(
            len(set(named).intersection(functions))
            for named, (_, functions) in zip(guesses, calls, strict=True)
        )
        assert right == session.figures.prefetch.right > 0
    options = ["--conversion", str(sparse), "--adapters", str(tmp_path / "a.npz")]
    arguments = ["cache-study", str(tmp_path / "t.npz"), *options, "--runtime", "reference"]
    result = CliRunner().invoke(app, [*arguments, "--plot", str(tmp_path / "p.svg"), "--json"])
    names = {row["predictor"] for row in json.loads(result.stdout)["rows"]}
    assert names == {"none", "static", "previous", "layer", "perfect", "router", "adapter"}
    assert "ahead by adapter" in (tmp_path / "p.svg").read_text()


def test_a_trace_of_another_model_lends_no_hidden_states(sparse, text, tmp_path):
    trace = record(sparse, text, max_tokens=60, runtime="reference")
    other = {
        layer: replace(one, chosen=np.argsort(one.mask(), 1)[:, :2].astype(np.int16))  # the others
        for layer, one in trace.layers.items()
    }
    for wrong in (
        replace(trace, layers=other),
        replace(trace, layers={0: trace.layers[0]}),
        replace(trace, tokens=trace.tokens + 1000),
    ):
        with pytest.raises(UserError, match="the trace is not of"):
            hear(wrong, sparse, runtime="reference")
    write_trace(trace, tmp_path / "t.npz")
    arguments = ["cache-study", str(tmp_path / "t.npz"), "--adapters", "a.npz"]
    assert isinstance(CliRunner().invoke(app, arguments).exception, UserError)
