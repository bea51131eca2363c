"""Rosters of experts, against Hugging Face's model whose routers choose with the same noise."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch.nn import functional as F

from ane_moe.conversion.pipeline import convert
from ane_moe.conversion.plan import ConvertOptions
from ane_moe.errors import UserError
from ane_moe.formats.recipe import FP16
from ane_moe.loop.buffers import Placement, _mask
from ane_moe.loop.figures import figures_line
from ane_moe.loop.generation import GenerateOptions, generate
from ane_moe.loop.roster import RosterOptions, RosterSession, averaged, read_schedule
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from ane_moe.model.spec import RouterSpec
from ane_moe.parts.router import Router
from ane_moe.verification.verify import verify
from tests.models import make_model, save_checkpoint
from tests.verification.tiny import FAMILY_SIZES, SIZES

LAYERS = 2
PROMPT = [5, 17, 3, 42, 9, 11]
TEXT = [8, 30, 2, 55]
COSINE = 0.9999


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    sizes = SIZES | FAMILY_SIZES["qwen3_moe"] | {"num_hidden_layers": LAYERS, "num_experts": 8}
    return make_model("qwen3_moe", **sizes)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    return save_checkpoint(model, tmp_path_factory.mktemp("roster") / "checkpoint")


@pytest.fixture(scope="module")
def out(checkpoint, tmp_path_factory):
    return converted(checkpoint, tmp_path_factory.mktemp("roster") / "out")


def converted(checkpoint, folder, **options):
    given = {"roster": True, "prefill": 8, "context": 64, "recipe": FP16} | options
    convert(checkpoint, folder, ConvertOptions(**given))
    return folder


def session(out, samples, tau=1.0, seed=7, **options):
    return RosterSession(
        load_shards(out, "reference"), RosterOptions(samples, tau, seed=seed, **options)
    )


def taken(session):
    """Logits of every sample of every token of TEXT, after PROMPT."""
    session.prefill(PROMPT)
    return [session.samples(identifier) for identifier in TEXT]


def with_noise(model, ids, noise):
    """Logits of the last token of `ids` where `noise [E]` by layer disturbs that token's choice."""

    def choose(layer):
        def hook(router, _, outputs):
            logits = outputs[0]
            disturbed = logits.clone()
            disturbed[-1] += torch.tensor(noise[layer], dtype=torch.float32)
            chosen = disturbed.topk(router.top_k, dim=-1).indices
            weights = F.softmax(logits, dim=-1).gather(1, chosen)
            if router.norm_topk_prob:
                weights = weights / weights.sum(-1, keepdim=True)
            return logits, weights, chosen

        return hook

    hooks = [
        layer.mlp.gate.register_forward_hook(choose(number))
        for number, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1].numpy()
    for hook in hooks:
        hook.remove()
    return logits


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"routing": "sparse"},
        {"layers_per_shard": 2},
        {"layout": "bct1", "state": "explicit"},
        {"max_shard_mb": 0},
    ],
    ids=["masked", "sparse", "stacked", "turned", "split"],
)
def test_samples_are_what_the_model_says_with_their_noise(model, checkpoint, options, tmp_path):
    out = converted(checkpoint, tmp_path / "out", **options)
    roster = session(out, samples=4)
    given = []  # noise of each call, by layer
    place = roster._prefill.slots.place

    def watched(*arguments, **keywords):
        place(*arguments, **keywords)
        given.append([roster._prefill.slots.columns(f"noise.gumbel.{n}") for n in range(LAYERS)])

    clean = [logits[0] for logits in taken(session(out, 1))]
    roster.prefill(PROMPT)
    roster._prefill.slots.place = watched
    for index, identifier in enumerate(TEXT):
        logits = roster.samples(identifier)
        np.testing.assert_array_equal(logits[0], clean[index])
        for sample, scores in enumerate(logits):
            noise = [columns[:, sample].astype(np.float32) for columns in given[-1]]
            expected = with_noise(model, PROMPT + TEXT[: index + 1], noise)
            assert cosine(scores, expected) > COSINE
    # Some noise changed what was chosen, or nothing was shown.
    assert np.abs(logits[1:] - logits[0]).max() > 0.01


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("samples", [2, 3, 8])
def test_without_noise_the_logits_are_those_of_one_sample(out, samples):
    one, many = session(out, 1), session(out, samples, tau=0.0)
    np.testing.assert_array_equal(many.prefill(PROMPT), one.prefill(PROMPT))
    for identifier in TEXT:
        np.testing.assert_array_equal(many.decode(identifier), one.decode(identifier))


def test_a_model_that_can_take_noise_is_the_same_without(out, checkpoint, tmp_path):
    plain = Session(load_shards(converted(checkpoint, tmp_path, roster=False), "reference"))
    able = Session(load_shards(out, "reference"))
    for by in ("prefill", "decode"):
        expected = plain.prefill_logits(PROMPT, by=by)
        np.testing.assert_array_equal(able.prefill_logits(PROMPT, by=by), expected)


def test_a_conversion_that_takes_noise_is_verified(out, checkpoint):
    report = verify(out, checkpoint=checkpoint)
    assert not report.failures and report.models


def test_later_tokens_see_the_first_sample_alone(out, checkpoint, tmp_path):
    """Caches after five tokens of wild samples are those of one sample, slot by slot."""
    explicit = converted(checkpoint, tmp_path, state="explicit")
    many, one = session(explicit, 8, tau=50.0), session(explicit, 1)
    for roster in (many, one):
        taken(roster)
    assert many._states.passed.keys() == one._states.passed.keys()
    for slot, state in many._states.passed.items():
        assert state.nbytes == one._states.passed[slot].nbytes
        np.testing.assert_array_equal(
            state[..., : many.position], one._states.passed[slot][..., : one.position]
        )
    np.testing.assert_array_equal(many.prefill_logits(PROMPT), one.prefill_logits(PROMPT))


def test_windows_hide_what_the_token_alone_would_not_see():
    mask, alone = np.zeros((1, 1, 4, 16), np.float16), np.zeros((1, 1, 4, 16), np.float16)
    _mask(mask, "mask.3", Placement(9, 4, {}, roster=True))
    _mask(alone, "mask.3", Placement(9, 1, {}))
    for sample in range(4):
        seen, expected = mask[0, 0, sample] == 0, alone[0, 0, 0] == 0
        np.testing.assert_array_equal(seen[:9], expected[:9])
        assert np.flatnonzero(seen[9:]).tolist() == [sample]


def test_noise_is_repeatable_by_its_seed(out):
    first, again, other = (np.stack(taken(session(out, 6, seed=seed))) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first[:, 0] == other[:, 0]).all() and (first[:, 1:] != other[:, 1:]).any()


def test_choices_follow_the_softmax_of_the_logits_over_tau():
    """The Gumbel-max trick: of k = 1 the marginals are known."""
    tau, experts, draws = 0.7, 5, 4000
    router = Router(4, RouterSpec(experts, 1, noise=True))
    logits = np.random.default_rng(3).normal(size=experts)
    noise = tau * np.random.default_rng(4).gumbel(size=(1, experts, 1, draws))
    scores = torch.tensor(logits).reshape(1, experts, 1, 1).expand(1, experts, 1, draws)
    gates = router._chosen(scores, torch.tensor(noise))
    counts = (gates[0, :, 0] > 0).sum(1).numpy()
    odds = np.exp(logits / tau)
    assert chisquare(counts, draws * odds / odds.sum()).pvalue > 0.01


@torch.no_grad()
def test_scores_are_disturbed_and_weights_are_not():
    """Sigmoid scores with a bias and groups: the choice is the oracle's over disturbed scores."""
    rng = np.random.default_rng(5)
    spec = RouterSpec(
        8, 2, score="sigmoid", bias=True, groups=4, open_groups=2, noise=True, scale=1.5
    )
    router = Router(4, spec)
    logits, bias = rng.normal(size=8), rng.normal(size=8) / 5
    router.choice_bias.data = torch.tensor(bias).reshape(1, 8, 1, 1)
    scores = 1 / (1 + np.exp(-logits))
    for _ in range(50):
        noise = rng.gumbel(size=8) / 4
        gates = router._scaled(
            router._chosen(*(torch.tensor(a).reshape(1, 8, 1, 1) for a in (logits, noise)))
        )
        ranked = (scores + bias + noise).reshape(4, 2)
        open_groups = np.argsort(-ranked.sum(1))[:2]
        hidden = np.full((4, 2), -np.inf)
        hidden[open_groups] = ranked[open_groups]
        chosen = np.argsort(-hidden.reshape(-1))[:2]
        expected = np.zeros(8)
        expected[chosen] = 1.5 * scores[chosen] / scores[chosen].sum()
        np.testing.assert_allclose(gates[0, :, 0, 0].numpy(), expected, rtol=1e-6, atol=1e-9)


def test_averages_are_of_probabilities():
    logits = np.random.default_rng(6).normal(size=(5, 40)).astype(np.float32) * 4
    probabilities = torch.softmax(torch.tensor(logits, dtype=torch.float64), -1).mean(0).numpy()
    found = averaged(logits)
    np.testing.assert_allclose(
        np.exp(found - found.max()) / np.exp(found - found.max()).sum(), probabilities, rtol=1e-12
    )
    wide = np.array([[0, 60000.0], [60000.0, 0]], np.float32)
    assert np.isfinite(averaged(wide)).all()


def test_generation_takes_a_roster(out):
    plain = [p.id for p in generate(session(out, 1), PROMPT, GenerateOptions(max_tokens=6))]
    same = session(out, 4, tau=0.0)
    assert [p.id for p in generate(same, PROMPT, GenerateOptions(max_tokens=6))] == plain
    wild = [
        [p.id for p in generate(session(out, 4, 9.0, seed), PROMPT, GenerateOptions(max_tokens=6))]
        for seed in range(6)
    ]
    assert any(ids != plain for ids in wild)


def test_distinct_experts_of_a_token_are_counted(out):
    for samples, tau in ((1, 0.0), (4, 0.0), (4, 9.0)):
        roster = session(out, samples, tau)
        roster.prefill(PROMPT)
        chosen = [roster.slot(f"gates.{layer}") != 0 for layer in roster.manifest.moe]
        found = roster.figures.roster.experts_per_layer
        assert found == np.mean([gates[:, :samples].any(axis=1).sum() for gates in chosen])
        k = np.mean([facts["k"] for facts in roster.manifest.moe.values()])
        assert (found > k) == (tau > 0)
        assert f"roster of {samples}, {found:.2f} distinct" in figures_line(roster.figures)


def test_layers_are_left_out_and_scaled_by_a_schedule(out, tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps({"1": 0.4}))
    scheduled = session(out, 2, schedule=read_schedule(path))
    assert [(slot, scale) for slot, _, scale in scheduled._noise] == [("noise.gumbel.1", 0.4)]
    assert session(out, 2, skip_layers=1)._noise == []  # the first and the last of two


def test_samples_grow_fewer_where_the_context_ends(out):
    roster = session(out, 8)
    roster.prefill([1] * 59)
    assert [len(roster.samples(2)) for _ in range(5)] == [5, 4, 3, 2, 1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"samples": 9}, "prefill functions take 8 tokens"),
        ({"samples": 0}, "a roster of 0"),
        ({"samples": 2, "tau": -1.0}, "not multiplied by -1"),
        ({"samples": 2, "tau": float("nan")}, "not multiplied by nan"),
        ({"samples": 2, "schedule": {7: 0.1}}, "layer 7 has no router"),
        ({"samples": 2, "skip_layers": -1}, "-1 layers"),
    ],
)
def test_what_is_not_possible_is_said(out, change, said):
    with pytest.raises(UserError, match=said):
        session(out, **change)


def test_other_conversions_take_no_noise(checkpoint, tmp_path):
    plain = converted(checkpoint, tmp_path / "plain", roster=False)
    with pytest.raises(UserError, match="convert with --roster"):
        session(plain, 2)
    with pytest.raises(UserError, match="soft routing chooses no experts"):
        converted(checkpoint, tmp_path / "soft", routing="soft")
    zaya = save_checkpoint(make_model("zaya"), tmp_path / "zaya")
    with pytest.raises(UserError, match="a roster is not possible with zaya"):
        converted(zaya, tmp_path / "out")


@pytest.mark.parametrize("text", ["[]", "{}", '{"a": 1}', '{"0": "x"}', "{"])
def test_a_schedule_that_is_none_is_refused(text, tmp_path):
    (tmp_path / "schedule.json").write_text(text)
    with pytest.raises(UserError):
        read_schedule(tmp_path / "schedule.json")
