"""The gate every function passes through: its delta against the golden's, within the limits."""

from dataclasses import fields, replace

import numpy as np

from ane_moe.verification.metrics import Distance, delta_distance, relative_l2_limit
from ane_moe.verification.result import ShardResult

NOT_FINITE = "NaN or Inf in the output"


def judge(
    path: str,
    kind: str,
    layer: int | None,
    function: str,
    base: np.ndarray,
    y: np.ndarray,
    delta: np.ndarray,
    min_cosine: float,
    left_out: np.ndarray | None = None,
) -> ShardResult:
    """What one function gave for N tokens, `y [N,C]`, against `base + delta`, both `[N,C]`.

    `left_out`, bool `[N]`, are tokens that say nothing of the function, because they were routed
    otherwise at a near tie.
    """
    plain = ShardResult(path, kind, layer, function, len(y), min_cosine, 0.0, False, NOT_FINITE)
    if not np.isfinite(y).all():
        return gated(plain, min_cosine)
    kept = slice(None) if left_out is None or left_out.all() else ~left_out
    distance = delta_distance(base[kept], y[kept], delta[kept])
    flips = 0 if isinstance(kept, slice) else int((~kept).sum())
    measured = replace(plain, reason=None, near_tie_flips=flips, **vars(distance))
    return gated(measured, min_cosine)


def gated(row: ShardResult, min_cosine: float) -> ShardResult:
    """What was measured, judged by a gate; a function that gave NaN or Inf fails by any."""
    limit = relative_l2_limit(min_cosine)
    row = replace(row, min_cosine=min_cosine, max_relative_l2=limit)
    if row.cosine is None:
        return row
    distance = Distance(**{each.name: getattr(row, each.name) for each in fields(Distance)})
    margin, l2_margin = distance.margin(min_cosine), distance.relative_l2_margin(limit)
    row = replace(row, margin=margin, relative_l2_margin=l2_margin)
    if row.reason == NOT_FINITE:
        return row
    reasons = [f"cosine {row.cosine:.6f} is below {min_cosine}"] if margin < 0 else []
    if l2_margin < 0:
        reasons.append(f"relative L2 error {row.relative_l2:.4f} is above {limit:.4f}")
    return replace(row, passed=not reasons, reason="; ".join(reasons) or None)
