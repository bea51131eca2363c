"""Multi-head latent attention (DeepSeek-V2 and later): the facts of the mixer, without torch.

Source: arXiv 2405.04434, and transformers' `DeepseekV3Attention`, in the form of the paper's
appendix: what makes keys of latents is applied to queries, and what makes values of them to what is
attended to. So all heads share one key and one value, and the cache is as narrow as these.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

from ane_moe.model.indexer import IndexerSpec
from ane_moe.model.kv_cache import cache_ports
from ane_moe.model.mixer import MixerConfig
from ane_moe.model.port import BEFORE, PASSED, Port
from ane_moe.model.spec import LATENT_SCALE
from ane_moe.model.weight import Weight


@dataclass(frozen=True)
class MlaSpec:
    """Each token keeps a normed latent of `kv_rank` channels, of which every head makes a key of
    `nope` and a value of `value` channels, and a rotated key of `rotated` channels that all heads
    share. Queries pass a normed latent of their own, of `q_rank` channels, if there is one.
    `interleaved`: the checkpoint pairs neighbouring channels. `gated`: what each head attends to is
    multiplied by the sigmoid of a projection of the layer's input. `gated_by_query`: each channel
    of it, by one of what queries are made of; that is both the query's latent normed and the latent
    as it is (`AXK2Attention`). `latent_scale` multiplies the normed latent. An `indexer` says
    which tokens are attended to, where there are more than it chooses. `key_norm`: the key that
    heads share is normed as latents are. `grows`: each head's query is multiplied by the logarithm
    of its place, from 1 on, times a number and plus another (arXiv 2501.19399)."""

    heads: int
    nope: int
    rotated: int
    value: int
    kv_rank: int
    q_rank: int | None
    scale: float
    rope: str | None
    bias: bool = False
    interleaved: bool = True
    latent_eps: float = 1e-6
    gated: bool = False
    gated_by_query: bool = False
    latent_scale: float = 1.0
    indexer: IndexerSpec | None = None
    window: int | None = None
    key_norm: bool = False
    grows: bool = False

    @property
    def kept(self) -> int:
        """Channels that the cache holds of a token."""
        return self.kv_rank + self.rotated

    @property
    def paired(self) -> int:
        """Channels of the indexer's heads, which may be rotated in pairs."""
        return self.indexer.width if self.indexer else 0

    def within(self, tokens: int) -> Self:
        """The same in a context of so many tokens: where no indexer leaves out any, without it."""
        needed = self.indexer is not None and self.indexer.chosen < tokens
        return self if needed else replace(self, indexer=None)

    def rows(self, d_model: int) -> Iterator[Weight]:
        """The tensors of a layer's attention."""
        inner, reads = d_model, "x"
        if self.q_rank:
            yield Weight("q_down.weight", (self.q_rank, d_model), "attention.q", reads="x")
            if self.bias:
                yield Weight("q_down.bias", (self.q_rank,))
            yield Weight("q_norm.weight", (self.q_rank,))
            inner, reads = self.q_rank * (1 + self.gated_by_query), "q_latent"
        for name, each in (("q_nope", self.nope), ("q_rotated", self.rotated)):
            if not each:
                continue
            width = self.heads * each
            yield Weight(f"{name}.weight", (width, inner), "attention.q", reads=reads)
        for name, width in (("latent", self.kv_rank), ("k_rotated", self.rotated)):
            if not width:
                continue
            yield Weight(f"{name}.weight", (width, d_model), "attention.k", reads="x")
            if self.bias:
                yield Weight(f"{name}.bias", (width,))
        yield Weight("latent_norm.weight", (self.kv_rank,), fold=LATENT_SCALE)
        if self.key_norm:
            yield Weight("k_norm.weight", (self.rotated,))
        yield Weight("key_of.weight", (self.heads * self.nope, self.kv_rank))
        yield Weight("value_of.weight", (self.heads * self.value, self.kv_rank))
        width = self.heads * self.value
        yield Weight(
            "o.weight", (d_model, width), "attention.o", reads="attended", fold="residual_scale"
        )
        if self.bias:
            yield Weight("o.bias", (d_model,), fold="residual_scale")
        if self.gated:
            yield Weight("gate.weight", (self.heads, d_model), "attention.q", reads="x")
        if self.gated_by_query:
            yield Weight("gate.weight", (width, inner), "attention.q", reads=reads)
        if self.grows:
            yield Weight("growth.scale", (self.heads,))
            yield Weight("growth.bias", (self.heads,))
        if self.indexer and self.q_rank:
            rows = self.indexer.rows(d_model, self.q_rank)
            yield from (row.under("index") for row in rows)


@dataclass(frozen=True)
class MlaConfig(MixerConfig):
    mixer: MlaSpec

    @property
    def states(self) -> tuple[Port, ...]:
        widths = {"cache": self.mixer.kept, "index_cache": self.mixer.paired}
        return tuple(
            Port(name, (1, 1, width, self.slots), f"state.{{0}}.{name}")
            for name, width in widths.items()
            if width
        )

    def host(self, tokens: int) -> tuple[Port, ...]:
        m = self.mixer
        ports = cache_ports(m.rope, self.rotary, m.window, self.slots, tokens)
        passed = Port(PASSED, (1, 1, 1, tokens), f"{PASSED}.{BEFORE}")
        return (*ports, passed) if m.grows else ports
