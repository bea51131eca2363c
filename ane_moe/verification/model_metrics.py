"""The whole model, token by token: the shards' logits against the golden's. N = tokens, V =
vocabulary."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ane_moe.redaction.spans import token_spans
from ane_moe.redaction.viterbi import Decoder, decoder_of
from ane_moe.verification.metrics import token_cosines
from ane_moe.verification.result import Divergence, FunctionModelResult


@dataclass(frozen=True)
class PromptLogits:
    """One prompt, or its end: its index, the position of the first token, the ids and both logits
    `[N,V]` for them."""

    prompt: int
    first: int
    ids: tuple[int, ...]
    golden: np.ndarray
    shards: np.ndarray


def compare_logits(
    function: str,
    prompts: Iterable[PromptLogits],
    min_logit_cosine: float,
    labels: Sequence[str] = (),
) -> FunctionModelResult:
    """Pool all positions of all prompts. `labels` are what the scores are of, where they are a
    token classifier's. Perplexities are None when no prompt has a second token to predict, and for
    scores of labels."""
    spans = SpanAgreement(decoder_of(labels))
    same: list[np.ndarray] = []
    kl: list[np.ndarray] = []
    cosines: list[np.ndarray] = []
    surprise: list[tuple[np.ndarray, np.ndarray]] = []
    first: Divergence | None = None
    for one in prompts:
        golden, shards = _log_softmax(one.golden), _log_softmax(one.shards)
        same.append(golden.argmax(1) == shards.argmax(1))
        kl.append((np.exp(golden) * (golden - shards)).sum(1))
        cosines.append(token_cosines(one.golden, one.shards))
        spans.add(one)
        following = np.array([] if labels else one.ids[1:], np.int64)
        rows = np.arange(len(following))
        surprise.append((-golden[rows, following], -shards[rows, following]))
        if first is None and not same[-1].all():
            first = _divergence(one, int(same[-1].argmin()))
    golden_nll, shards_nll = (np.concatenate(values) for values in zip(*surprise, strict=True))
    pooled = np.concatenate(cosines)
    logit_cosine = float(pooled.mean())
    agreement = float(np.concatenate(same).mean())
    return FunctionModelResult(
        function=function,
        tokens=len(pooled),
        top1_agreement=agreement,
        label_agreement=agreement if labels else None,
        span_agreement=spans.f1,
        mean_kl=float(np.concatenate(kl).mean()),
        perplexity_golden=float(np.exp(golden_nll.mean())) if golden_nll.size else None,
        perplexity_shards=float(np.exp(shards_nll.mean())) if shards_nll.size else None,
        logit_cosine=logit_cosine,
        worst_logit_cosine=float(pooled.min()),
        first_differing_greedy_token=first,
        min_logit_cosine=min_logit_cosine,
        passed=bool(logit_cosine >= min_logit_cosine),
    )


@dataclass
class SpanAgreement:
    """How many spans the best legal labels of both scores give (`decoder`; None: labels give none),
    and how many of them both do: in their first token, their last, and their kind."""

    decoder: Decoder | None
    both: int = 0
    golden: int = 0
    shards: int = 0

    def add(self, one: PromptLogits) -> None:
        """Count those of a prompt."""
        if self.decoder is None:
            return
        golden, shards = map(self._spans, (one.golden, one.shards))
        self.both += len(golden & shards)
        self.golden += len(golden)
        self.shards += len(shards)

    @property
    def f1(self) -> float | None:
        """Of the shards' spans against the golden's; None where neither gives any."""
        count = self.golden + self.shards
        return 2 * self.both / count if count else None

    def _spans(self, scores: np.ndarray) -> set[tuple[int, int, str]]:
        assert self.decoder is not None
        if not np.isfinite(scores).all():
            return set()
        names = [self.decoder.labels[one] for one in self.decoder.decode(scores)]
        return set(token_spans(names))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def _divergence(one: PromptLogits, position: int) -> Divergence:
    row = one.golden[position]
    own, other = int(row.argmax()), int(one.shards[position].argmax())
    return Divergence(one.prompt, one.first + position, own, other, float(row[own] - row[other]))
