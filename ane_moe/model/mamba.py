"""Mamba, the first one, with norms inside (Jamba): the facts of the mixer, without torch.

Source: arXiv 2312.00752 and 2403.19887, and transformers' `JambaMambaMixer`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ane_moe.model.mixer import MixerConfig
from ane_moe.model.port import Port
from ane_moe.model.recent import WIDTH, recent_port, shift_port
from ane_moe.model.weight import Weight


@dataclass(frozen=True)
class MambaSpec:
    """Each channel keeps a row of `state` numbers. A token lets each decay, adds to all, and reads
    them: `s = exp(-exp(decay) dt) s + dt u b; o = s c + skip u`.

    u passes a causal convolution by channel, of `taps` tokens, and SiLU; b, c and what is `rank`
    wide and gives `dt = softplus(step(norm(step_in(u))))` are of it, each normed (`eps`). What is
    given is multiplied by `silu(z(x))`. `bias`: projections of the stream have one.
    """

    inner: int
    state: int
    rank: int
    taps: int
    eps: float
    bias: bool = False
    conv_bias: bool = True
    rope: None = None
    window: None = None

    # Rows of a checkpoint's matrices for several things at once.

    @property
    def u_rows(self) -> int:
        return self.inner

    @property
    def z_rows(self) -> int:
        return self.inner

    @property
    def step_in_rows(self) -> int:
        return self.rank

    @property
    def b_rows(self) -> int:
        return self.state

    @property
    def c_rows(self) -> int:
        return self.state

    @property
    def history(self) -> int:
        """Tokens before a call that its convolution sees."""
        return self.taps - 1

    def rows(self, d_model: int) -> Iterator[Weight]:
        """The tensors of a layer's mixer."""
        for name, role in (("u", "v"), ("z", "gate")):
            yield Weight(f"{name}.weight", (self.inner, d_model), f"attention.{role}", reads="x")
            if self.bias:
                yield Weight(f"{name}.bias", (self.inner,))
        yield Weight("conv.weight", (self.inner, 1, self.taps))
        if self.conv_bias:
            yield Weight("conv.bias", (self.inner,))
        widths = {"step_in": self.rank, "b": self.state, "c": self.state}
        for name, width in widths.items():
            yield Weight(f"{name}.weight", (width, self.inner))
        for name, width in widths.items():
            yield Weight(f"{name}_norm.weight", (width,))
        yield Weight("step.weight", (self.inner, self.rank))
        yield Weight("step.bias", (self.inner,))
        yield Weight("decay.weight", (self.inner, self.state))
        yield Weight("skip.weight", (self.inner,))
        shape = (d_model, self.inner)
        yield Weight("o.weight", shape, "attention.o", reads="attended", fold="residual_scale")
        if self.bias:
            yield Weight("o.bias", (d_model,), fold="residual_scale")


@dataclass(frozen=True)
class MambaConfig(MixerConfig):
    mixer: MambaSpec

    @property
    def states(self) -> tuple[Port, ...]:
        m = self.mixer
        shape = (1, m.inner * m.state // WIDTH, 1, WIDTH)  # rows of channels, end to end
        return (recent_port("recent", m.inner), Port("memory", shape, "state.{0}.memory"))

    def host(self, tokens: int) -> tuple[Port, ...]:
        shift = shift_port("shift", self.mixer.history, tokens)
        # A call of one token has no padding.
        return (shift, Port("real", (1, 1, 1, tokens), "real")) if tokens > 1 else (shift,)
