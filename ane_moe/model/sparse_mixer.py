"""The router of Phi-MoE, without torch: two experts, each weighted among those close behind it.

Source: transformers' `sparsemixer` (arXiv 2409.12136), as it works outside of training.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ane_moe.model.ranking import PLAIN, Ranking
from ane_moe.model.weight import Weight


@dataclass(frozen=True)
class SparseMixerSpec:
    """Twice the expert of the largest logit m is chosen, and then left out. Its weight is its share
    of a softmax over all experts that are left whose logit l is near:
    `m - l <= 2 * jitter * max(|l|, m)`.
    """

    experts: int
    jitter: float
    k: int = 2
    carry: int = 0
    takes: bool = False
    ranking: Ranking = PLAIN

    @property
    def classes(self) -> int:
        """Rows of the gates."""
        return self.experts

    def rows(self, d_model: int) -> Iterator[Weight]:
        yield Weight("weight", (self.experts, d_model))
