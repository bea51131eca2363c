"""Mamba-2 (Granite 4, Nemotron-H): the facts of the mixer, without torch.

Source: arXiv 2405.21060, and transformers' `GraniteMoeHybridMambaLayer`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ane_moe.model.mixer import MixerConfig
from ane_moe.model.port import Port
from ane_moe.model.recent import recent_port, shift_port
from ane_moe.model.weight import Weight


@dataclass(frozen=True)
class Mamba2Spec:
    """Each head keeps a matrix S, `(head_dim, state)`. A token lets it decay, adds to it, and reads
    it: `S = exp(-exp(decay) dt) S + dt u b'; o = S c + skip u`.

    u, b and c pass a causal convolution by channel, of `taps` tokens, and SiLU; b and c are shared
    by the neighbouring heads of a group. `dt = softplus(step(x) + offset)`. What is given is
    multiplied by `silu(z(x))`, then normed by group (`eps`). `bias`: projections have one.
    """

    heads: int
    head_dim: int
    groups: int
    state: int
    taps: int
    eps: float
    bias: bool = False
    conv_bias: bool = True
    rope: None = None
    window: None = None

    @property
    def inner(self) -> int:
        """Channels of all heads: of u and z."""
        return self.heads * self.head_dim

    @property
    def shared(self) -> int:
        """Channels of all groups: of b, and of c."""
        return self.groups * self.state

    @property
    def channels(self) -> int:
        """Of u, b and c together."""
        return self.inner + 2 * self.shared

    # Rows of a checkpoint's one matrix for all of them.

    @property
    def z_rows(self) -> int:
        return self.inner

    @property
    def u_rows(self) -> int:
        return self.inner

    @property
    def b_rows(self) -> int:
        return self.shared

    @property
    def c_rows(self) -> int:
        return self.shared

    @property
    def step_rows(self) -> int:
        return self.heads

    @property
    def history(self) -> int:
        """Tokens before a call that its convolution sees."""
        return self.taps - 1

    def rows(self, d_model: int) -> Iterator[Weight]:
        """The tensors of a layer's mixer."""
        widths = {"z": self.inner, "u": self.inner, "b": self.shared, "c": self.shared}
        roles = {"z": "gate", "u": "v", "b": "k", "c": "q"}
        for name, width in widths.items():
            role = f"attention.{roles[name]}"
            yield Weight(f"{name}.weight", (width, d_model), role, reads="x")
            if self.bias:
                yield Weight(f"{name}.bias", (width,))
        yield Weight("step.weight", (self.heads, d_model))
        if self.bias:
            yield Weight("step.bias", (self.heads,))
        yield Weight("step.offset", (self.heads,))
        yield Weight("step.decay", (self.heads,))
        yield Weight("skip.weight", (self.heads,))
        yield Weight("conv.weight", (self.channels, 1, self.taps))
        if self.conv_bias:
            yield Weight("conv.bias", (self.channels,))
        yield Weight("value_norm.weight", (self.inner,))
        shape = (d_model, self.inner)
        yield Weight("o.weight", shape, "attention.o", reads="attended", fold="residual_scale")
        if self.bias:
            yield Weight("o.bias", (d_model,), fold="residual_scale")


@dataclass(frozen=True)
class Mamba2Config(MixerConfig):
    mixer: Mamba2Spec

    @property
    def states(self) -> tuple[Port, ...]:
        m = self.mixer
        shape = (1, m.heads, m.head_dim, m.state)
        return (recent_port("recent", m.channels), Port("memory", shape, "state.{0}.memory"))

    def host(self, tokens: int) -> tuple[Port, ...]:
        shift = shift_port("shift", self.mixer.history, tokens)
        # A call of one token has no padding.
        return (shift, Port("real", (1, 1, 1, tokens), "real")) if tokens > 1 else (shift,)
