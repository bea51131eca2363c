"""Gated delta net (Qwen3-Next, Qwen3.5): the facts of the mixer, without torch.

Source: arXiv 2412.06464, and transformers' `Qwen3NextGatedDeltaNet`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ane_moe.model.mixer import MixerConfig
from ane_moe.model.port import Port
from ane_moe.model.recent import recent_port, shift_port
from ane_moe.model.weight import Weight


@dataclass(frozen=True)
class DeltaNetSpec:
    """Each value head keeps a matrix S, `(value_dim, key_dim)`. A token lets it decay, puts right
    by beta what it gives for the token's key, and asks it with the token's query:
    `S = exp(g) S; S += beta (v - S k) k'; o = S q`.

    Queries, keys and values pass a causal convolution by channel, of `taps` tokens, and SiLU; then
    queries and keys have the length 1. `g = -exp(rate) softplus(decay(x))`, `beta =
    sigmoid(beta(x))`. What is given is normed by head (`eps`), and multiplied by `silu(z(x))`.
    Neighbouring value heads share a key head.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int
    eps: float
    rope: None = None
    window: None = None

    @property
    def queries(self) -> int:
        """Channels of all queries, and of all keys."""
        return self.key_heads * self.key_dim

    @property
    def keys(self) -> int:
        return self.queries

    @property
    def values(self) -> int:
        """Channels of all values."""
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Of queries, keys and values together."""
        return 2 * self.queries + self.values

    # Rows of each key head in a checkpoint that lays all of them one after the other.

    @property
    def query_rows(self) -> int:
        return self.key_dim

    @property
    def key_rows(self) -> int:
        return self.key_dim

    @property
    def value_rows(self) -> int:
        return self.values // self.key_heads

    @property
    def z_rows(self) -> int:
        return self.value_rows

    @property
    def beta_rows(self) -> int:
        return self.value_heads // self.key_heads

    @property
    def decay_rows(self) -> int:
        return self.beta_rows

    @property
    def history(self) -> int:
        """Tokens before a call that its convolution sees."""
        return self.taps - 1

    def rows(self, d_model: int) -> Iterator[Weight]:
        """The tensors of a layer's mixer."""
        yield from self.projection_rows(d_model)
        yield from self.gate_rows(d_model)
        yield Weight("value_norm.weight", (self.value_dim,))
        shape = (d_model, self.values)
        yield Weight("o.weight", shape, "attention.o", reads="attended", fold="residual_scale")

    def projection_rows(self, d_model: int) -> Iterator[Weight]:
        """Of queries, keys and values."""
        widths = {"query": self.queries, "key": self.keys, "value": self.values}
        for name, width in widths.items():
            yield Weight(f"{name}.weight", (width, d_model), f"attention.{name[0]}", reads="x")

    def gate_rows(self, d_model: int) -> Iterator[Weight]:
        """Of what decays, writes and leaves, and of the convolution."""
        yield Weight("z.weight", (self.values, d_model), "attention.gate", reads="x")
        yield Weight("beta.weight", (self.value_heads, d_model))
        yield Weight("decay.weight", (self.value_heads, d_model))
        yield Weight("decay.bias", (self.value_heads,))
        yield Weight("decay.rate", (self.value_heads,))
        yield Weight("conv.weight", (self.channels, 1, self.taps))


@dataclass(frozen=True)
class DeltaNetConfig(MixerConfig):
    mixer: DeltaNetSpec

    @property
    def states(self) -> tuple[Port, ...]:
        m = self.mixer
        shape = (1, m.value_heads, m.value_dim, m.key_dim)
        return (
            recent_port("recent", m.channels),
            Port("memory", shape, "state.{0}.memory"),
        )

    def host(self, tokens: int) -> tuple[Port, ...]:
        shift = shift_port("shift", self.mixer.history, tokens)
        # A call of one token has no padding.
        return (shift, Port("real", (1, 1, 1, tokens), "real")) if tokens > 1 else (shift,)
