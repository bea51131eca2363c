"""Experts that attention shards guess, against Hugging Face's routers on adapted hidden states, and
against the host that guesses them by itself."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ane_moe.benchmark import measurement
from ane_moe.cli import app
from ane_moe.conversion import early
from ane_moe.conversion.early import EarlyRows
from ane_moe.conversion.job import open_job
from ane_moe.conversion.pipeline import convert, plan
from ane_moe.conversion.plan import ConvertOptions
from ane_moe.early_adapters import Adapters, levelled, read_adapters, write_adapters
from ane_moe.errors import UserError
from ane_moe.formats.recipe import FP16, find_recipe
from ane_moe.loop.prefetch import Guessing, settled
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from ane_moe.manifest import read_manifest
from ane_moe.mlprogram.program import Function
from ane_moe.mlprogram.reader import read_program
from ane_moe.model.ranking import PLAIN
from ane_moe.routing.residuals import record_residuals
from ane_moe.verification.verify import verify
from tests.early import drawn_adapters, drawn_file
from tests.models import make_model, save_checkpoint
from tests.slow_set import slow_but
from tests.verification.tiny import tiny_conversion, tiny_model

D, LAYERS, EXPERTS, K, PREFILL = 24, 3, 6, 2, 8
IDS = np.random.default_rng(5).integers(3, 60, 30).tolist()
SIZES = {
    "num_hidden_layers": LAYERS,
    "num_experts": EXPERTS,
    "num_experts_per_tok": K,
    "max_position_embeddings": 128,
}
CLOSE = 4e-3  # of scores: fp16 rounds them, and the residual's level before
STREAM = {"routing": "stream", "layout": "bct1", "state": "explicit"}
FORMS = {
    "sparse": {},
    "stream, explicit states, [1,C,T,1]": STREAM,
    "sparse, palettes": {"recipe": find_recipe("lut4")},
    "sparse, for Core AI": {"format": "aimodel"},
    "stream, for Core AI": STREAM | {"format": "aimodel", "recipe": find_recipe("int8")},
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny_model("qwen3_moe", **SIZES)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> Path:
    return save_checkpoint(model, tmp_path_factory.mktemp("early") / "checkpoint")


def converted(checkpoint: Path, out: Path, ahead: int = 1, seed: int = 0, **options) -> Path:
    layers = range(LAYERS - ahead)
    file = drawn_file(out.parent / f"a-{seed}.npz", D, layers, ahead, seed)
    shape = {"routing": "sparse", "prefill": PREFILL, "expert_tokens": (1, PREFILL)}
    return tiny_conversion(checkpoint, out, early=str(file), ahead=ahead, **shape | options)


@pytest.fixture(scope="module")
def out(checkpoint, tmp_path_factory) -> Path:
    return converted(checkpoint, tmp_path_factory.mktemp("early") / "out", golden=True)


def guessed(out: Path, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the tokens of IDS: the hidden state that a layer's experts add to, and what its shard
    scores while they are decoded."""
    shards = load_shards(
        out, "reference" if read_manifest(out).package_form != ".aimodel" else "coreai"
    )
    session, scores = Session(shards), []
    for identifier in IDS:
        session.decode(identifier)
        scores.append(session._decode.slots.columns(f"guess.{layer}")[:, 0].copy())
    return record_residuals(shards, [IDS]).entering[layer], np.stack(scores)


def test_scores_are_those_of_the_later_layers_own_router(model, out):
    """Its norm's scale is one number a token, which changes no order."""
    adapters = read_adapters(out / "early.npz", D)
    assert adapters.ahead.keys() == {(0, 1), (1, 1)} and not adapters.exits
    for layer in (0, 1):
        hidden, scores = guessed(out, layer)
        later = model.model.layers[layer + 1]
        with torch.no_grad():
            state = torch.from_numpy(adapters.ahead[layer, 1](hidden))
            logits = later.mlp.gate.weight @ later.post_attention_layernorm(state).T
        expected = logits.T.numpy() * np.sqrt(np.square(state.numpy()).mean(1, keepdims=True))
        assert np.linalg.norm(scores - expected) < CLOSE * np.linalg.norm(expected)
        plain = levelled(hidden) @ later.mlp.gate.weight.detach().numpy().T
        assert np.linalg.norm(plain - expected) > 0.3 * np.linalg.norm(expected)
        order = np.sort(expected, 1)[:, ::-1]
        clear = order[:, K - 1] - order[:, K] > CLOSE * np.abs(expected).max()
        sets = [np.sort(np.argsort(-one[clear], 1)[:, :K], 1) for one in (scores, expected)]
        np.testing.assert_array_equal(*sets)
        assert clear.mean() > 0.8


@pytest.mark.parametrize("form", slow_but(list(FORMS)[:2], FORMS))
@pytest.mark.parametrize("ahead", slow_but([2], [1, 2]))
def test_a_session_loads_by_them_what_the_host_would_and_changes_no_bit(
    checkpoint, tmp_path, form, ahead
):
    if "Core AI" in form and importlib.util.find_spec("coreai_torch") is None:
        pytest.skip("Core AI's packages are not installed")
    runtime = "coreai" if "Core AI" in form else "reference"
    out = converted(checkpoint, tmp_path / "out", ahead, **FORMS[form])
    found = {}
    for name in ("none", "adapter", "auto"):
        shards = load_shards(out, runtime, expert_cache_bytes=5 * 2 * 3 * D * D)
        session = Session(shards, predictor=Guessing(name))
        logits = np.array([session.decode(identifier).copy() for identifier in IDS])
        found[name] = (logits, session.figures.prefetch)
    assert found["none"][1] is None and found["auto"][1].predictor == "shard"
    for name in ("adapter", "auto"):
        np.testing.assert_array_equal(found[name][0], found["none"][0])
    host, shard = found["adapter"][1], found["auto"][1]
    assert (host.needed, host.predicted) == (shard.needed, shard.predicted)
    assert abs(host.right - shard.right) <= 1 and shard.right > 10  # one near tie


def operations(function: Function) -> list[str]:
    return [one.type for one in function.block.operations if one.type != "const"]


def test_decode_has_one_convolution_more_and_prefill_is_as_it_was(checkpoint, out, tmp_path):
    shape = {"routing": "sparse", "prefill": PREFILL, "expert_tokens": (1, PREFILL)}
    plain = tiny_conversion(checkpoint, tmp_path / "plain", **shape)
    counts = []
    for folder in (plain, out):
        program = read_program(folder / "attn/layer_00.mlpackage")
        counts.append({name: operations(one) for name, one in program.functions.items()})
    assert sorted([*counts[0]["decode"], "conv"]) == sorted(counts[1]["decode"])
    assert counts[0]["prefill"] == counts[1]["prefill"] != []
    before, after = (read_manifest(folder).shards[0] for folder in (plain, out))
    assert after.weight_bytes == before.weight_bytes + 2 * EXPERTS * D
    more = [b.elements - a.elements for a, b in zip(before.functions, after.functions, strict=True)]
    assert more == [EXPERTS * D, 0]
    assert before.functions[1] == after.functions[1]
    (last,) = (one for one in read_manifest(out).shards if one.path == "attn/layer_02.mlpackage")
    assert (
        last.functions[0].ports == read_manifest(plain).shards_of("attn", 2)[0].functions[0].ports
    )


WRONG = {
    "no adapter": (early.Adapter, "before", lambda self, rows: rows),
    "the adapter the wrong way": (
        early.Adapter,
        "before",
        lambda self, rows: rows + rows @ self.down @ self.up,
    ),
    "the norm left out": (
        early,
        "router_table",
        lambda checkpoint, tensors, *rest: checkpoint.read(tensors[0]).astype(np.float32),
    ),
}


@pytest.mark.parametrize("name", [None, *slow_but(["no adapter"], WRONG)])
def test_verify_proves_them_and_nothing_else_fails_for_them(
    checkpoint, tmp_path, monkeypatch, name
):
    if name:
        monkeypatch.setattr(*WRONG[name])
    report = verify(converted(checkpoint, tmp_path / "out", golden=True), runtime="reference")
    rows = [row for row in report.shards if "guess" in row.function]
    assert [(row.function, row.layer) for row in rows] == [("decode guess", n) for n in (0, 1)]
    failing = [row for row in report.shards if not row.passed]
    assert failing == (rows if name else []) and report.passed == (name is None)


def test_other_adapters_write_the_guessing_shards_alone(checkpoint, tmp_path):
    out = converted(checkpoint, tmp_path / "out")
    first = read_manifest(out)
    file = drawn_file(tmp_path / "a-0.npz", D, range(2), 1, seed=1)
    shape = {"routing": "sparse", "prefill": PREFILL, "expert_tokens": (1, PREFILL)}
    options = ConvertOptions(recipe=FP16, early=str(file), **shape)
    assert set(convert(checkpoint, out, options).written) == {
        "attn/layer_00.mlpackage",
        "attn/layer_01.mlpackage",
    }
    second = read_manifest(out)
    assert first.files["early.npz"] != second.files["early.npz"]
    assert not convert(checkpoint, out, options).written
    plain = convert(checkpoint, out, replace(options, early=None), overwrite=True)
    assert len(plain.written) == 2 and not (out / "early.npz").exists()
    assert plain.manifest.early is None and "guesses" not in plain.manifest.moe["0"]


FAMILIES = ("granitemoe", "mixtral", "gemma4_text", "qwen3_next", "olmoe")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families_guess_as_their_host_does(family, tmp_path):
    checkpoint = save_checkpoint(make_model(family), tmp_path / "checkpoint")
    facts = plan(checkpoint, ConvertOptions(routing="sparse", prefill=0))
    layers = [n for n in facts.layers if hasattr(facts.spec.layers[n].ffn, "router")]
    file = drawn_file(tmp_path / "a.npz", facts.spec.d_model, layers[:-1], 1)
    options = {"routing": "sparse", "prefill": PREFILL, "early": str(file), "golden": True}
    report = verify(tiny_conversion(checkpoint, tmp_path / "out", **options), runtime="reference")
    rows = [row for row in report.shards if "guess" in row.function]
    assert len(rows) == len(layers[:-1]) and report.passed


@pytest.mark.parametrize(
    "options, adapters, message",
    [
        ({"routing": "masked"}, {}, "loaded ahead"),
        ({"ahead": LAYERS}, {}, "no experts 3 layers ahead"),
        ({"ahead": 2}, {}, "no adapters for experts 2 layers ahead"),
        ({"layers": (0,)}, {}, "no experts 1 layer ahead are converted"),
        ({}, {"d_model": D + 1}, "holds adapters of another model"),
        ({}, {"layers": (0, 1, 2)}, "of another model"),
        ({}, {"layers": (0,)}, "of another model"),
    ],
)
def test_what_cannot_be_guessed_is_one_line(checkpoint, tmp_path, options, adapters, message):
    given = {"d_model": D, "layers": (0, 1), "ahead": 1} | adapters
    asked = {"routing": "sparse", "early": str(drawn_file(tmp_path / "a.npz", **given))} | options
    with pytest.raises(UserError, match=message):
        plan(checkpoint, ConvertOptions(**asked))


def test_experts_that_no_matrix_chooses_are_refused(tmp_path):
    checkpoint = save_checkpoint(make_model("zaya"), tmp_path / "checkpoint")
    facts = plan(checkpoint, ConvertOptions())
    file = drawn_file(tmp_path / "a.npz", facts.spec.d_model, (0,), 1)
    with pytest.raises(UserError, match="zaya are not guessed by shards"):
        plan(checkpoint, ConvertOptions(routing="sparse", early=str(file)))


def test_numbers_that_fp16_does_not_hold_are_refused(checkpoint, tmp_path):
    huge = drawn_adapters(D, range(2), 1)
    ahead = {place: replace(one, up=one.up * 1e8) for place, one in huge.ahead.items()}
    write_adapters(Adapters(D, ahead), tmp_path / "a.npz")
    options = ConvertOptions(routing="sparse", early=str(tmp_path / "a.npz"))
    job = open_job(checkpoint, tmp_path / "out", options)
    with pytest.raises(UserError, match="layer 1 overflows fp16 with its adapter"):
        job.plan.early[0].value(job.checkpoint)


NO_SOURCES = ((), None, PLAIN)


def test_a_source_is_told_by_its_numbers():
    one, other = (drawn_adapters(D, (0,), 1, seed).ahead[0, 1] for seed in (0, 1))
    sources = [EarlyRows(*NO_SOURCES, each.digest, each) for each in (one, one, other)]
    assert sources[0] == sources[1] != sources[2] and len(set(sources)) == 2
    assert replace(one, up=-one.up).digest != one.digest


def test_bench_measures_what_generate_does(out, monkeypatch):
    """By what shards guess, unless it is told otherwise."""
    sessions = []

    def session(*given, **options):
        sessions.append(Session(*given, **options))
        return sessions[-1]

    monkeypatch.setattr(measurement, "Session", session)
    quick = ["--runs", 1, "--warmup", 1, "--tokens", 2, "--fills", 0, "--lengths", PREFILL]
    for given in ([], ["--predictor", "none"]):
        arguments = ["bench", out, *quick, "--runtime", "reference", *given]
        assert CliRunner().invoke(app, [str(one) for one in arguments]).exit_code == 0
    by_shards, none = (one.figures.prefetch for one in sessions)
    assert by_shards.predictor == "shard" and by_shards.predicted > 0 and none is None


def test_the_command_line(checkpoint, out, tmp_path):
    def run(*arguments: object):
        return CliRunner().invoke(app, [str(one) for one in arguments])

    ids = ",".join(map(str, IDS))
    generate = ("generate", out, "--prompt-ids", ids, "--max-tokens", 5, "--runtime", "reference")
    assert "guesses by the shards: " in run(*generate).stderr
    document = json.loads(run(*generate, "--json").stdout)
    assert document["figures"]["prefetch"]["predictor"] == "shard"
    assert "guesses" not in run(*generate, "--predictor", "none").stderr
    refused = run(*generate, "--predictor", "shard", "--ahead", 2).exception
    assert isinstance(refused, UserError) and "1 layer ahead" in str(refused)
    file = drawn_file(tmp_path / "a.npz", D, (0, 1), 1)
    convert_ = ("convert", checkpoint, tmp_path / "x", "--routing", "stream", "--dry-run")
    assert "scores experts 1 layer ahead" in run(*convert_, "--early", file).stdout
    alone = run(*convert_, "--ahead", 1).exception
    assert isinstance(alone, UserError) and "no --early" in str(alone)
    with pytest.raises(UserError, match="no --early"):
        plan(checkpoint, ConvertOptions(routing="stream", ahead=2))
    unused = run(*generate, "--adapters", file).exception
    assert isinstance(unused, UserError) and "found: guesses by: shard" in str(unused)
    silent = replace(read_manifest(out), moe={"0": {"experts": EXPERTS, "k": K}})
    assert settled(Guessing("auto"), silent).predictor == "none"
    damaged = replace(silent, moe={"0": {"experts": EXPERTS, "k": K, "guesses": 7}})
    with pytest.raises(UserError, match="convert again"):
        settled(Guessing("auto"), damaged)
    with pytest.raises(UserError, match="guess no experts"):
        settled(Guessing("shard"), silent)
