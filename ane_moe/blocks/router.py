"""The router: exact top-k gates in a static graph."""

import torch
from torch import Tensor

from ane_moe.blocks.projection import Projection
from ane_moe.spec import RouterSpec

# Larger than any router logit, and twice it is still inside fp16.
FAR = 2e4


def top_k_mask(logits: Tensor, k: int, experts: int) -> Tensor:
    """1 at the k largest of axis 1, 0 elsewhere; the lowest index wins ties. `(1, E, 1, T) -> (1, E, 1, T)`.

    k rounds of maximum and mask: `topk` (rf-detr pull request 1495), `gather` (ane-guide, chapter 18) and comparisons
    (mobius) leave the engine, so equality is arithmetic.
    Two different fp16 numbers are at least 2^-24 apart, and clipping and scaling twice turns that into 0 or 1 without
    leaving fp16. `ramp` falls with the index, so that of equal maxima the first remains.
    """
    steps = 1 << (experts - 1).bit_length()
    ramp = (torch.arange(experts, 0, -1) / steps).to(logits.dtype).reshape(1, experts, 1, 1)
    left = logits
    for _ in range(k):
        below = left.amax(1, keepdim=True) - left  # 0 at the maxima
        key = ramp - _is_positive(below)  # above 0 only at the maxima, all different
        others = (key.amax(1, keepdim=True) - key).clamp(max=1 / steps) * steps  # 0 at the first maximum, else 1
        left = left - (1 - others) * FAR
    return (-FAR / 2 - left).clamp(0, 1)


def _is_positive(x: Tensor) -> Tensor:
    """1 where x > 0, 0 where x == 0, for differences of fp16 numbers (multiples of 2^-24)."""
    return (x.clamp(max=2**-9) * 2**15).clamp(max=2**-9) * 2**9


class Router(Projection):
    """Gates `(1, d, 1, T) -> (1, E, 1, T)`: zero outside the k chosen, or the whole softmax if `soft`."""

    def __init__(self, d_model: int, spec: RouterSpec, soft: bool = False):
        super().__init__(d_model, spec.experts, spec.bias)
        self.spec = spec
        self.soft = soft

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        if self.soft:
            return torch.softmax(logits, dim=1)
        mask = top_k_mask(logits, self.spec.k, self.spec.experts)
        if self.spec.renorm:  # a softmax over the chosen logits alone
            return torch.softmax(logits + (mask - 1) * FAR, dim=1)
        return torch.softmax(logits, dim=1) * mask
