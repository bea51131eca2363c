"""Do the shards choose the model's experts? N = tokens, E = experts, k = experts per token."""

import numpy as np

from ane_moe.verification.result import RoutingResult

# Logits apart by less than this may change places: fp16 rounds logits of 16 to 32 by up to 0.008,
# and the router's input by as much again, for each of the two.
NEAR_TIE = 0.03


def compare_routing(
    layer: int,
    gates: np.ndarray,
    probs: np.ndarray,
    indices: np.ndarray,
    scores: np.ndarray | None = None,
) -> RoutingResult:
    """A shard's `gates [N,E]` against the golden's full probabilities `[N,E]` and choices `[N,k]`
    for the same tokens. `scores [N,E]` are what they were chosen by, if not the probabilities.

    An expert is chosen by the shard when its gate is not zero.
    """
    chosen = _chosen(probs, indices)
    gates64, probs64 = np.abs(gates.astype(np.float64)), probs.astype(np.float64)
    total = gates64.sum(1)
    outside = np.where(chosen, 0, gates64).sum(1)
    return RoutingResult(
        layer=layer,
        tokens=len(gates),
        set_agreement=float(1 - _flipped(gates, chosen).mean()),
        near_tie_flips=int(near_tie_flips(gates, probs, indices, scores).sum()),
        mass_outside_top_k=float((np.where(chosen, 0, probs64).sum(1) / probs64.sum(1)).mean()),
        gate_mass_outside_top_k=float((outside / np.where(total > 0, total, 1)).mean()),
    )


def near_tie_flips(
    gates: np.ndarray, probs: np.ndarray, indices: np.ndarray, scores: np.ndarray | None = None
) -> np.ndarray:
    """Tokens, bool `[N]`, for which the shard chose other experts where the golden itself was all
    but undecided.

    Undecided: the scores of the golden's last expert in and first expert out are less apart than a
    change of NEAR_TIE in their logits would move them (a probability moves by no more than its own
    share). Such a flip says nothing of the experts' own numerics.
    """
    chosen = _chosen(probs, indices)
    ranked = probs if scores is None else scores
    last_in = np.where(chosen, ranked, np.inf).argmin(1)
    first_out = np.where(chosen, -np.inf, ranked).argmax(1)
    rows = np.arange(len(probs))
    gap = ranked[rows, last_in] - ranked[rows, first_out]
    moved = (probs[rows, last_in] + probs[rows, first_out]) / 2 * NEAR_TIE
    return np.asarray(_flipped(gates, chosen) & (gap < moved))


def _chosen(probs: np.ndarray, indices: np.ndarray) -> np.ndarray:
    chosen = np.zeros(probs.shape, bool)
    np.put_along_axis(chosen, indices.astype(np.int64), True, axis=1)
    return chosen


def _flipped(gates: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    return np.asarray(((gates != 0) != chosen).any(1))
