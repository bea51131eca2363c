"""An indexer, which chooses the tokens that attention goes to: its facts, without torch.

Source: transformers' `DeepseekV32Indexer` and `GlmMoeDsaIndexer`. Of their scores the order alone
counts, so that factors of all of them are left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ane_moe.model.weight import Weight


@dataclass(frozen=True)
class IndexerSpec:
    """A token scores those before it by `sum_h weight_h relu(q_h . k)`, of `heads` queries, `width`
    channels wide, that are made of the latent of attention's own, and one key, which is normed by
    torch's LayerNorm. Attention goes to the `chosen` best, and to all that score what the last of
    them does. The first channels are rotated as attention's are; `interleaved`: in pairs of
    neighbours, of which ours have the first of all pairs in one half, and the second in the other.
    """

    heads: int
    width: int
    chosen: int
    interleaved: bool = False
    eps: float = 1e-6

    def rows(self, d_model: int, latent: int) -> Iterator[Weight]:
        """Its tensors, beside an attention whose queries are made of so many channels."""
        width = self.heads * self.width
        yield Weight("q.weight", (width, latent), "attention.q", reads="index_latent")
        yield Weight("k.weight", (self.width, d_model), "attention.k", reads="x")
        yield Weight("k_norm.weight", (self.width,))
        yield Weight("k_norm.bias", (self.width,))
        yield Weight("by_head.weight", (self.heads, d_model))
