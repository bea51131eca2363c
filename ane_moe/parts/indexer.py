"""An indexer: which tokens attention goes to, as a mask.

H = heads, D = their channels, T = tokens, S = slots of the cache.
"""

import torch
from torch import Tensor, nn

from ane_moe.model.indexer import IndexerSpec
from ane_moe.parts.block import MASKED
from ane_moe.parts.norm import LayerNorm
from ane_moe.parts.projection import Projection

# Brings the smallest difference of two normal fp16 numbers to 1, which all larger ones are cut to.
APART = 2**15


class Indexer(nn.Module):
    def __init__(self, d_model: int, latent: int, spec: IndexerSpec, ranks: tuple[int, int]):
        super().__init__()
        self.spec = spec
        self.q = Projection(latent, spec.heads * spec.width, rank=ranks[0])
        self.k = Projection(d_model, spec.width, rank=ranks[1])
        self.k_norm = LayerNorm(spec.width, spec.eps)
        self.by_head = Projection(d_model, spec.heads)

    def key(self, h: Tensor, inputs: dict[str, Tensor], pairs: int) -> Tensor:
        """What the cache keeps of tokens, `(1, 1, D, T)`."""
        normed = self.k_norm(self.k(h)).reshape(1, 1, self.spec.width, -1)
        return self._rotated(normed, inputs, pairs)

    def seen(
        self, h: Tensor, latent: Tensor, keys: Tensor, inputs: dict[str, Tensor], pairs: int
    ) -> Tensor:
        """The additive mask `(1, 1, T, S)` with what is not chosen hidden too."""
        m, mask = self.spec, inputs["mask"]
        q = self._rotated(self.q(latent).reshape(1, m.heads, m.width, -1), inputs, pairs)
        scores = torch.relu((q * m.width**-0.5).transpose(2, 3) @ keys)  # (1, H, T, S)
        weights = self.by_head(h).reshape(1, m.heads, 1, -1).transpose(2, 3) * m.heads**-0.5
        ranked = (scores * weights).sum(1, keepdim=True) + mask  # (1, 1, T, S)
        least = torch.topk(ranked, m.chosen, dim=-1).values.amin(-1, keepdim=True)
        below = ((least - ranked).clamp(0, 1) * APART).clamp(0, 1)
        return mask + below * MASKED

    def _rotated(self, heads: Tensor, inputs: dict[str, Tensor], pairs: int) -> Tensor:
        """The first channels rotated; what they are in order of is the same for queries and keys,
        and of no account."""
        if "cos" not in inputs:
            return heads
        second = self.spec.width // 2 if self.spec.interleaved else pairs
        cos, sin = inputs["cos"], inputs["sin"]
        a, b = heads[:, :, :pairs], heads[:, :, second : second + pairs]
        rest = ((pairs, second), (second + pairs, self.spec.width))
        kept = [heads[:, :, first:end] for first, end in rest if first < end]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, *kept], dim=2)
