"""Lightning attention (MiniMax-Text-01): the facts of the mixer, without torch.

Source: arXiv 2401.04658 and 2501.08313, and transformers' `MiniMaxLightningAttention`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ane_moe.model.mixer import MixerConfig
from ane_moe.model.port import Port
from ane_moe.model.weight import Weight


@dataclass(frozen=True)
class LightningSpec:
    """Each head keeps a matrix S, `(head_dim, head_dim)`, of which every token leaves the same
    share: `S = exp(-slope) S + v k'; o = S q`.

    Queries, keys and values pass SiLU. What all heads give is normed together (`eps`), and
    multiplied by `sigmoid(gate(x))`.
    """

    heads: int
    head_dim: int
    eps: float
    rope: None = None
    window: None = None

    @property
    def channels(self) -> int:
        """Of all queries, and of all keys, and of all values."""
        return self.heads * self.head_dim

    # Rows of each head in a checkpoint that lays all of them one after the other.

    @property
    def query_rows(self) -> int:
        return self.head_dim

    @property
    def key_rows(self) -> int:
        return self.head_dim

    @property
    def value_rows(self) -> int:
        return self.head_dim

    def rows(self, d_model: int) -> Iterator[Weight]:
        """The tensors of a layer's mixer."""
        roles = {"query": "q", "key": "k", "value": "v", "gate": "gate"}
        for name, role in roles.items():
            shape = (self.channels, d_model)
            yield Weight(f"{name}.weight", shape, f"attention.{role}", reads="x")
        yield Weight("slope.weight", (self.heads,))
        yield Weight("mixed_norm.weight", (self.channels,))
        shape = (d_model, self.channels)
        yield Weight("o.weight", shape, "attention.o", reads="attended", fold="residual_scale")


@dataclass(frozen=True)
class LightningConfig(MixerConfig):
    """Beside the matrices it keeps what fp16 rounded away of them: where hardly anything decays, a
    sum of thousands of tokens would not notice the next one."""

    mixer: LightningSpec

    @property
    def states(self) -> tuple[Port, ...]:
        shape = (1, self.mixer.heads, self.mixer.head_dim, self.mixer.head_dim)
        return tuple(Port(name, shape, f"state.{{0}}.{name}") for name in ("memory", "rest"))

    def host(self, tokens: int) -> tuple[Port, ...]:
        # A call of one token has no padding.
        return (Port("real", (1, 1, 1, tokens), "real"),) if tokens > 1 else ()
