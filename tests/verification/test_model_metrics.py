"""Model-level figures against PyTorch's own losses."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ane_moe.verification.model_metrics import PromptLogits, compare_logits

VOCAB = 37


def prompts(noise, lengths=(9, 1, 4), seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for index, length in enumerate(lengths):
        golden = 3 * rng.normal(size=(length, VOCAB)).astype(np.float32)
        shards = golden + noise * rng.normal(size=golden.shape).astype(np.float32)
        made.append(
            PromptLogits(index, 0, tuple(rng.integers(0, VOCAB, length).tolist()), golden, shards)
        )
    return made


def test_kl_and_perplexity_equal_torch():
    given = prompts(0.5)
    result = compare_logits("decode", given, 0.9)
    golden, shards = (
        torch.tensor(np.concatenate([getattr(one, name) for one in given])).double()
        for name in ("golden", "shards")
    )
    kl = F.kl_div(
        shards.log_softmax(-1), golden.log_softmax(-1), reduction="batchmean", log_target=True
    )
    assert result.mean_kl == pytest.approx(float(kl), rel=1e-6)
    for name, value in (("golden", result.perplexity_golden), ("shards", result.perplexity_shards)):
        logits = torch.tensor(np.concatenate([getattr(one, name)[:-1] for one in given]))
        targets = torch.tensor([identifier for one in given for identifier in one.ids[1:]])
        assert value == pytest.approx(float(F.cross_entropy(logits, targets).exp()), rel=1e-5)
    assert result.logit_cosine == pytest.approx(
        float(F.cosine_similarity(golden, shards).mean()), rel=1e-6
    )
    assert result.top1_agreement == pytest.approx(
        float((golden.argmax(-1) == shards.argmax(-1)).float().mean())
    )


def test_equal_logits_are_perfect():
    result = compare_logits("prefill", prompts(0), 0.99)
    assert (result.top1_agreement, result.mean_kl, result.first_differing_greedy_token) == (
        1.0,
        0.0,
        None,
    )
    assert result.logit_cosine == pytest.approx(1) and result.passed and result.tokens == 14


def test_the_first_other_greedy_token_comes_with_the_goldens_own_preference():
    given = prompts(0)
    shards = given[2].shards.copy()
    shards[1] = 0
    shards[1, 5] = 50
    given[2] = PromptLogits(2, 3, given[2].ids, given[2].golden, shards)
    first = compare_logits("decode", given, 0.0).first_differing_greedy_token
    best = np.sort(given[2].golden[1])[-1]
    assert (first.prompt, first.position, first.shards) == (2, 3 + 1, 5)
    assert first.golden_margin == pytest.approx(best - given[2].golden[1, 5])


def test_single_tokens_have_no_perplexity():
    result = compare_logits("decode", prompts(0.1, lengths=(1, 1)), 0.5)
    assert result.perplexity_golden is None and result.perplexity_shards is None


def test_nan_logits_fail():
    given = prompts(0)
    given[0].shards[0, 0] = np.nan
    assert not compare_logits("decode", given, 0.5).passed


BIOES = ("O", "B-name", "I-name", "E-name", "S-name")


def scores_of(tags: str) -> np.ndarray:
    """Scores of BIOES that prefer one tag for each token."""
    return np.array([[4.0 * (label[0] == tag) for label in BIOES] for tag in tags], np.float32)


@pytest.mark.parametrize(
    ("shards", "f1"),
    [
        ("OBIEOSO", 1.0),
        ("OBEOOSO", 0.5),  # one ends early: of two each, one is the same
        ("OBIEOOO", 2 / 3),
        ("OOOOOOO", 0.0),
    ],
)
def test_spans_agree_as_counted_by_hand(shards, f1):
    golden = scores_of("OBIEOSO")
    one = PromptLogits(0, 0, tuple(range(7)), golden, scores_of(shards))
    assert compare_logits("length_8", [one], 0.5, BIOES).span_agreement == pytest.approx(f1)


def test_labels_that_spell_no_spans_have_no_agreement_of_spans():
    one = PromptLogits(0, 0, (1, 2), scores_of("OS"), scores_of("OS"))
    other = compare_logits("length_8", [one], 0.5, ("a", "b", "c", "d", "e"))
    assert other.span_agreement is None and other.label_agreement == 1
    assert compare_logits("decode", [one], 0.5).span_agreement is None


def test_scores_that_are_not_finite_give_no_spans():
    broken = scores_of("OS")
    broken[0, 0] = np.nan
    one = PromptLogits(0, 0, (1, 2), scores_of("OS"), broken)
    assert compare_logits("length_8", [one], 0.5, BIOES).span_agreement == 0
