"""The router: exact top-k gates in a static graph."""

import torch
from torch import Tensor

from ane_moe.model.spec import RouterSpec
from ane_moe.parts.projection import Projection

# Larger than any router logit, and twice it is still inside fp16.
FAR = 2e4
# The smallest normal fp16 number. Scaled by 2^10, no two different fp16 numbers are nearer.
LEAST = 2**-14


def top_k_mask(logits: Tensor, k: int, experts: int) -> Tensor:
    """1 at the k largest of axis 1, 0 elsewhere; the lowest index wins ties. `(1, E, 1, T) -> (1, E, 1, T)`.

    An expert is chosen when fewer than k others come before it, so all pairs are compared at once: 10 operations,
    where k rounds of maximum and mask with the same rule for ties take 13 each (an operation costs about 6 us on the
    engine, ane-guide chapter 9). `topk`, `gather` and comparisons leave the engine, so "is positive" is arithmetic:
    clipping at LEAST leaves just LEAST or 0, and every constant is a normal fp16 number.
    """
    earlier = torch.ones(experts, experts).tril(-1) * LEAST  # an equal logit of lower index comes before
    ahead = (logits.reshape(1, 1, experts, -1) - logits).clamp(-1, 1) * 2**10  # (1, E, E, T): the other less this one
    wins = (ahead + earlier.to(logits.dtype).reshape(1, experts, experts, 1)).clamp(0, LEAST)
    return (k - wins.sum(2, keepdim=True) * 2**14).clamp(0, 1)


class Router(Projection):
    """Gates `(1, d, 1, T) -> (1, E, 1, T)`: zero outside the k chosen, or the whole softmax if `soft`."""

    def __init__(self, d_model: int, spec: RouterSpec, soft: bool = False):
        super().__init__(d_model, spec.experts)
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
