"""Choosing the next token from logits."""

from dataclasses import dataclass

import numpy as np

from ane_moe.errors import UserError


class Sampler:
    """Greedy at temperature 0, else seeded draws from the `top_p` nucleus. Ties go to the lowest
    id."""

    def __init__(
        self, temperature: float = 0.0, top_p: float = 1.0, seed: int | None = None
    ) -> None:
        """Raises UserError for a negative temperature or a `top_p` outside (0, 1]."""
        if not 0 <= temperature < np.inf:
            raise UserError("the temperature must be 0 or more", str(temperature), "0 means greedy")
        if not 0 < top_p <= 1:
            raise UserError(
                "top-p must be above 0 and at most 1", str(top_p), "1 keeps every token"
            )
        self.temperature = temperature
        self.top_p = top_p
        self._random = np.random.default_rng(seed)

    def pick(self, logits: np.ndarray) -> int:
        """Id of the next token from fp32 logits `[V]`. Raises UserError when they hold a NaN or no
        finite maximum."""
        best = int(np.argmax(logits))  # the first NaN, where there is one
        if not np.isfinite(logits[best]):
            raise UserError(
                "the shards returned logits that are not finite",
                f"{logits[best]} for id {best}",
                "run `ane-moe verify` on this conversion",
            )
        if self.temperature == 0:
            return best
        ids, probabilities = nucleus(logits, self.temperature, self.top_p)
        total = np.cumsum(probabilities)
        return int(
            ids[
                min(
                    np.searchsorted(total, self._random.random() * total[-1], side="right"),
                    len(ids) - 1,
                )
            ]
        )


@dataclass(frozen=True)
class TokenScores:
    """The natural logarithm of a chosen token's probability, and those of the likeliest tokens by
    id, most likely first: of the logits as they are, whatever the temperature."""

    logprob: float
    top: tuple[tuple[int, float], ...]


def token_scores(logits: np.ndarray, chosen: int, top: int) -> TokenScores:
    """Of the logits `[V]` that `chosen` was picked from, with the `top` likeliest. Ties go to the
    lowest id."""
    highest = float(logits.max())
    total = highest + float(np.log(np.exp(logits.astype(np.float64) - highest).sum()))
    top = min(top, len(logits))
    bound = np.partition(logits, -top)[-top] if top else np.inf
    ids = np.flatnonzero(logits >= bound)
    likeliest = ids[np.argsort(-logits[ids], kind="stable")][:top]
    return TokenScores(
        float(logits[chosen]) - total, tuple((int(i), float(logits[i]) - total) for i in likeliest)
    )


def nucleus(logits: np.ndarray, temperature: float, top_p: float) -> tuple[np.ndarray, np.ndarray]:
    """Smallest set of most likely ids whose probability reaches `top_p`: ids (most likely first)
    and fp64 probabilities, renormalised. Never empty (Holtzman et al. 2019, arXiv 1904.09751)."""
    weights = np.exp((logits.astype(np.float64) - float(logits.max())) / temperature)
    total = weights.sum()
    # Ids below this add up to less than half of 1 - top_p, so none is in the nucleus and none needs
    # sorting.
    candidates = np.flatnonzero(weights >= 0.5 * (1 - top_p) * total / len(weights))
    ids = candidates[np.argsort(-logits[candidates], kind="stable")]
    cumulative = np.cumsum(weights[ids])
    kept = min(1 + int(np.searchsorted(cumulative, top_p * total, side="left")), len(ids))
    return ids[:kept], weights[ids[:kept]] / cumulative[kept - 1]
