"""Guesses by routers that choose by more than one matrix (scores, biases, groups, idle experts),
against Hugging Face's router modules, and shards against the host."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from ane_moe.conversion import early
from ane_moe.conversion.job import open_job
from ane_moe.conversion.pipeline import moe_facts, plan
from ane_moe.conversion.plan import ConvertOptions
from ane_moe.conversion.side_files import write_routers
from ane_moe.errors import UserError
from ane_moe.loop.prefetch import Guessing, RouterAhead
from ane_moe.loop.router_table import Chooser, RouterTable, read_routers
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from ane_moe.model.ranking import PLAIN, Ranking, parse_ranking
from ane_moe.model.routed import EarlyConfig
from ane_moe.parts.early import EarlyRouter
from ane_moe.routing.alignment import fit, pair
from ane_moe.routing.residuals import record_residuals
from ane_moe.verification.verify import verify
from tests.early import drawn_file
from tests.models import make_model, save_checkpoint
from tests.runtime.numpy_shards import make_manifest
from tests.verification.tiny import tiny_conversion

PREFILL = 8
SAME = 0.95  # of the tokens: others are near ties, which fp16 decides
THREE = {"num_hidden_layers": 3}  # two of them with experts
FAMILIES = {"deepseek_v3": THREE, "glm4_moe": THREE, "gpt_oss": {}, "minimax_m2": {}}
FURTHER = {
    "lfm2_moe": {},
    "ernie4_5_moe": THREE,
    "longcat_flash": {},
    "step3p7": {},
    "kolibri1": {},
    "omni_moe": {},
    "deepseek_v2": THREE,
    "dots1": THREE,
    "mistral4": THREE,
    "nemotron_h": {"layers_block_type": ["moe", "linear_attention", "moe"]},
}
CAPPED = {"laguna": {"moe_router_logit_softcapping": 0.3}}  # one layer of two has experts


def tables(model: PreTrainedModel, folder: Path) -> dict[int, RouterTable]:
    """What a conversion leaves for the host, without the rest of it."""
    checkpoint, out = save_checkpoint(model, folder / "checkpoint"), folder / "out"
    job = open_job(checkpoint, out, ConvertOptions(routing="sparse", prefill=0))
    out.mkdir(exist_ok=True)
    write_routers(job.checkpoint, job.sources, job.plan, out)
    facts, files = dict(moe_facts(job.plan)), dict.fromkeys(job.plan.routers.values(), "")
    width = job.plan.spec.d_model
    return read_routers(out, replace(make_manifest((None,)), moe=facts, files=files, d_model=width))


def chosen(model: PreTrainedModel, layer: int, hidden: np.ndarray) -> np.ndarray:
    """By Hugging Face's router: the experts of each token, rising."""
    block = model.model.layers[layer]
    (router,) = (one for one in block.mlp.modules() if type(one).__name__.endswith("Router"))
    own = [block.mlp.e_score_correction_bias] if model.config.model_type == "minimax_m2" else []
    with torch.no_grad():
        normed = block.post_attention_layernorm(torch.from_numpy(hidden.astype(np.float32)))
        return np.sort(router(normed, *own)[2].numpy(), 1)


def same(router: RouterTable, hidden: np.ndarray, expected: np.ndarray) -> float:
    """The share of tokens whose guesses are just these."""
    guesses = RouterAhead({1: router})
    found = np.array([np.sort(guesses.predict(1, one)) for one in hidden])
    return float((found == expected).all(1).mean())


@pytest.mark.parametrize("family", FAMILIES | CAPPED)
def test_the_host_names_whom_the_router_chooses_of_the_state_that_it_reads(family, tmp_path):
    model = make_model(family, **(FAMILIES | CAPPED)[family])
    layer = model.config.num_hidden_layers - 1
    router, random = tables(model, tmp_path)[layer], np.random.default_rng(0)
    spread = np.exp(random.normal(size=(400, 1)) * 2)  # no norm sees it
    states = random.normal(size=(400, router.weights.shape[1])) * spread
    hidden = states.astype(np.float16)
    expected = chosen(model, layer, hidden)
    assert same(router, hidden, expected) >= SAME
    ranking = router.chooser.ranking
    without_bias = replace(router, bias=np.zeros_like(router.bias))
    assert same(without_bias, hidden, expected) < 0.8
    assert ranking.sees_scale and router.bias.std() > 0.02
    if ranking.score != "logits":
        by_logits = replace(router.chooser, ranking=replace(ranking, score="logits"))
        assert same(replace(router, chooser=by_logits), hidden, expected) < 0.9
    if ranking.softcap:
        uncapped = replace(router.chooser, ranking=replace(ranking, softcap=None))
        assert same(replace(router, chooser=uncapped), hidden, expected) < 0.9
    if ranking.groups > 1:
        ungrouped = replace(ranking, groups=1, open_groups=1, group_best=1)
        everywhere = replace(router.chooser, ranking=ungrouped)
        assert same(replace(router, chooser=everywhere), hidden, expected) < 0.7


# Routers after other norms than by the mean square: the layers, the norm, and the router in each.
OTHERWISE = {
    "cohere2_moe": ("model.layers", "input_layernorm", "mlp.gate"),
    "dbrx": ("transformer.blocks", "norm_attn_norm.norm_2", "ffn.router"),
    "phimoe": ("model.layers", "post_attention_layernorm", "mlp.router"),
    "flex_olmo": ("model.layers", None, "mlp.gate"),
}


def modules(model: PreTrainedModel, family: str) -> tuple[nn.Module, nn.Module | None, nn.Module]:
    """Hugging Face's second layer, its norm before experts, and its router."""
    layers, norm, router = OTHERWISE[family]
    layer = model.get_submodule(layers)[1]
    return layer, norm and layer.get_submodule(norm), layer.get_submodule(router)


@torch.no_grad()
def named(model: PreTrainedModel, family: str, hidden: np.ndarray) -> np.ndarray:
    """By these: the experts of each token, rising."""
    layer, norm, router = modules(model, family)
    states = torch.from_numpy(hidden.astype(np.float32))
    given = router(norm(states) if norm else states)
    if family == "dbrx":
        given = layer.ffn.route_tokens_to_experts(given)
    return np.sort(given[-1].numpy(), 1)


@pytest.mark.parametrize("family", OTHERWISE)
def test_the_host_names_whom_routers_after_other_norms_choose(family, tmp_path):
    """Of states whose mean over channels is as large as what differs from it, at any scale: layer
    norms see none of it."""
    model = make_model(family)
    _, norm, gate = modules(model, family)
    if family == "phimoe":
        norm.bias.data *= 4  # so that it decides something
    router, random = tables(model, tmp_path)[1], np.random.default_rng(0)
    states = random.normal(size=(400, router.weights.shape[1])) + random.normal(size=(400, 1))
    hidden = (states * np.exp(random.normal(size=(400, 1)))).astype(np.float16)
    expected, ranking = named(model, family, hidden), router.chooser.ranking
    assert same(router, hidden, expected) >= SAME
    assert ranking.centred == (family != "flex_olmo")
    assert ranking.before_mixer == (family == "cohere2_moe")
    assert (router.bias is not None) == (family == "phimoe")
    if ranking.centred:
        rows = next(gate.parameters()).detach() * norm.weight.detach()
        off = replace(router.chooser, ranking=replace(ranking, centred=False))
        assert same(replace(router, weights=rows.numpy(), chooser=off), hidden, expected) < 0.8
    if ranking.bias:
        assert same(replace(router, bias=np.zeros_like(router.bias)), hidden, expected) < 0.8
        assert same(replace(router, chooser=off), hidden, expected) < 0.9  # at another scale


def converted(family: str, overrides: dict[str, object], folder: Path) -> tuple[Path, list[int]]:
    """With guesses by adapters that nobody fitted; and its layers with experts."""
    checkpoint = save_checkpoint(make_model(family, **overrides), folder / "checkpoint")
    facts = plan(checkpoint, ConvertOptions(routing="sparse", prefill=0))
    layers = [n for n in facts.layers if hasattr(facts.spec.layers[n].ffn, "router")]
    file = drawn_file(folder / "a.npz", facts.spec.d_model, layers[:-1], 1)
    shape = {"routing": "sparse", "prefill": PREFILL, "expert_tokens": (1, PREFILL)}
    out = tiny_conversion(checkpoint, folder / "out", early=str(file), golden=True, **shape)
    return out, layers


@pytest.fixture(scope="module")
def glm(tmp_path_factory) -> Path:
    return converted("glm4_moe", THREE, tmp_path_factory.mktemp("ranking"))[0]


@pytest.mark.slow
@pytest.mark.parametrize("family", [one for one in FAMILIES | FURTHER if one != "glm4_moe"])
def test_shards_score_as_the_host_does(family, tmp_path):
    out, layers = converted(family, (FAMILIES | FURTHER)[family], tmp_path)
    report = verify(out, runtime="reference")
    rows = [row for row in report.shards if "guess" in row.function]
    assert len(rows) == len(layers[:-1]) and report.passed


def test_a_shard_levels_what_differs_from_the_mean_as_the_host_does():
    random = torch.Generator().manual_seed(0)
    ranking = Ranking(bias=True, centred=True)
    part = EarlyRouter(12, 1e-6, EarlyConfig(5, ranking))
    for weight in part.parameters():
        weight.data = torch.randn(weight.shape, generator=random)
    x = torch.randn(1, 12, 1, 7, generator=random) * 9 + 20  # (1, d, 1, T)
    weights, bias = part.weight.detach().reshape(5, 12), part.choice_bias.detach().reshape(5)
    table = RouterTable(weights.numpy(), Chooser(5, 2, ranking), bias.numpy())
    expected = table.scores(table.read(x[0, :, 0].T.numpy()))
    found = part(x)[0, :, 0].T.detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    by_mean_square = EarlyRouter(12, 1e-6, EarlyConfig(5, replace(ranking, centred=False)))
    by_mean_square.load_state_dict(part.state_dict())
    assert not np.allclose(by_mean_square(x)[0, :, 0].T.detach().numpy(), expected, atol=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERWISE)
def test_shards_score_after_other_norms_and_adapters_lead_to_what_routers_read(family, tmp_path):
    out, layers = converted(family, {}, tmp_path)
    report = verify(out, runtime="reference")
    (row,) = (row for row in report.shards if "guess" in row.function)
    assert layers == [0, 1] and row.layer == 0 and row.passed
    ids = np.random.default_rng(6).integers(3, 60, 60).tolist()
    shards = load_shards(out, "reference")
    heard, router = record_residuals(shards, [ids]), read_routers(out, shards.manifest)[1]
    _, wanted = pair(heard, 0, 1, router)
    guesses = RouterAhead({1: router})
    found = [sorted(guesses.predict(1, one)) for one in wanted]
    used = [np.flatnonzero(one).tolist() for one in heard.chosen[1]]
    assert np.mean([one == two for one, two in zip(found, used, strict=True)]) >= SAME
    require_the_same_loads(out)


def require_the_same_loads(out: Path) -> None:
    """By shards and by the host, with the logits that come without either."""
    ids = np.random.default_rng(5).integers(3, 60, 24).tolist()
    found = {}
    for name in ("none", "adapter", "shard"):
        session = Session(load_shards(out, "reference"), predictor=Guessing(name))
        logits = np.array([session.decode(identifier).copy() for identifier in ids])
        found[name] = (logits, session.figures.prefetch)
    for name in ("adapter", "shard"):
        np.testing.assert_array_equal(found[name][0], found["none"][0])
    host, shard = found["adapter"][1], found["shard"][1]
    assert host.predicted == shard.predicted > 0
    assert abs(host.right - shard.right) <= 2 and shard.right > 10  # near ties


def test_shards_guess_in_groups_and_a_session_loads_what_the_host_would(glm):
    report = verify(glm, runtime="reference")
    rows = [row for row in report.shards if "guess" in row.function]
    assert {row.layer for row in rows} == {1} and report.passed
    require_the_same_loads(glm)


@pytest.mark.slow
def test_idle_experts_are_not_among_those_that_a_fit_is_to_name(tmp_path):
    out, (first, second, *_) = converted("longcat_flash", {}, tmp_path)
    ids = [np.random.default_rng(n).integers(3, 60, 30).tolist() for n in range(6)]
    shards = load_shards(out, "reference")
    found = fit(shards, ids, 6, (1,))
    heard, table = record_residuals(shards, ids), read_routers(out, shards.manifest)[second]
    cut, experts = 4 * 30, table.chooser.experts
    guesses = RouterAhead({second: table})
    pairs = zip(heard.entering[first][cut:], heard.chosen[second][cut:, :experts], strict=True)
    right = sum(used[guesses.predict(second, one)].sum() for one, used in pairs)
    assert heard.chosen[second][cut:, experts:].any()
    expected = right / heard.chosen[second][cut:, :experts].sum()
    (router,) = (one for one in found.recalls if one.predictor == "router")
    assert router.at_k == pytest.approx(expected)


@pytest.mark.slow
def test_the_bias_of_another_layer_is_found(tmp_path, monkeypatch):
    right = early.bias_source
    monkeypatch.setattr(
        early, "bias_source", lambda sources, layer, how: right(sources, layer - 1, how)
    )
    out, _ = converted("glm4_moe", THREE, tmp_path)
    report = verify(out, runtime="reference")
    failing = [row for row in report.shards if not row.passed]
    assert failing == [row for row in report.shards if "guess" in row.function] != []


def test_a_layers_own_router_names_its_experts_of_what_enters_them(glm):
    """Of the very states that shards route by, through all of a session."""
    ids = np.random.default_rng(6).integers(3, 60, 60).tolist()
    shards = load_shards(glm, "reference")
    heard = record_residuals(shards, [ids])
    guesses = RouterAhead(read_routers(glm, shards.manifest))
    for layer, hidden in heard.entering.items():
        named = [sorted(guesses.predict(layer, one)) for one in hidden]
        used = [np.flatnonzero(one).tolist() for one in heard.chosen[layer]]
        assert np.mean([one == two for one, two in zip(named, used, strict=True)]) >= SAME


def test_groups_and_idle_experts_by_hand():
    scores = np.array([9, 1, 1, 6, 6, 5, 8, 2], np.float32)  # sums of two: 10, 7, 11, 10
    pairs = Chooser(8, 3, Ranking("sigmoid", groups=4, open_groups=2, group_best=2))
    assert pairs.highest(scores) == [0, 4, 5]
    by_one = Chooser(8, 3, Ranking(groups=4, open_groups=2))
    assert by_one.highest(scores) == [0, 6, 7]
    assert Chooser(8, 3).highest(scores) == [0, 6, 3]
    assert Chooser(5, 3).highest(scores) == [0, 3]  # the last three classes are idle
    both = pairs.eligible(np.stack([scores, scores[::-1]]))
    assert np.isinf(both).sum(1).tolist() == [4, 4] and both[1, 1] == 8


@pytest.mark.parametrize(
    "facts",
    [
        {"score": "tanh"},
        {"bias": 2},
        {"groups": 5},
        {"groups": 4.0},
        {"groups": 4, "open_groups": 9},
        {"of": 1},
        {"softcap": -1},
        ["score"],
    ],
)
def test_what_no_conversion_says_of_a_ranking_is_one_line(facts):
    with pytest.raises(UserError, match="convert again"):
        parse_ranking(facts, 8)


def test_a_ranking_is_read_as_it_was_written_and_the_plain_one_is_not_said():
    capped = Ranking("softmax", True, 30.0, 4, 2, 2)
    assert parse_ranking(capped.as_json(), 8) == capped
    assert PLAIN.as_json() == {} and parse_ranking({}, 8) == PLAIN
