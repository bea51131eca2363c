"""The gate every function passes through: its delta against the golden's, within the limits."""

import numpy as np

from ane_moe.verification.metrics import delta_distance, relative_l2_limit
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
    limit = relative_l2_limit(min_cosine)
    if not np.isfinite(y).all():
        return ShardResult(
            path, kind, layer, function, len(y), min_cosine, limit, False, NOT_FINITE
        )
    kept = slice(None) if left_out is None or left_out.all() else ~left_out
    distance = delta_distance(base[kept], y[kept], delta[kept])
    margin, l2_margin = distance.margin(min_cosine), distance.relative_l2_margin(limit)
    reasons = [f"cosine {distance.cosine:.6f} is below {min_cosine}"] if margin < 0 else []
    reasons += (
        [f"relative L2 error {distance.relative_l2:.4f} is above {limit:.4f}"]
        if l2_margin < 0
        else []
    )
    flips = 0 if isinstance(kept, slice) else int((~kept).sum())
    return ShardResult(
        path,
        kind,
        layer,
        function,
        len(y),
        min_cosine,
        limit,
        not reasons,
        "; ".join(reasons) or None,
        flips,
        margin=margin,
        relative_l2_margin=l2_margin,
        **vars(distance),
    )
