"""What all mixers have in common: the norm before, the residual after, and what they keep."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from ane_moe.model.port import STREAM, Port, Ports
from ane_moe.model.spec import MixerSpec, NormSpec, entry_rows, residual_rows
from ane_moe.model.weight import Row, with_directions
from ane_moe.parts.block import Block
from ane_moe.parts.norm import RmsNorm
from ane_moe.parts.residual import Entry, residual


@dataclass(frozen=True)
class MixerConfig:
    """`rotary` is the number of rotated channel pairs r (0: no RoPE); `slots` the cache width S;
    `explicit` makes what is kept plain inputs and outputs instead of Core ML state. `ranks` are the
    directions kept apart from projections, by path. `affine` and `entry` are LayerSpec's."""

    d_model: int
    norm: NormSpec
    mixer: MixerSpec
    rotary: int = 0
    slots: int = 0
    explicit: bool = False
    ranks: tuple[tuple[str, int], ...] = ()
    affine: bool = False
    entry: bool = False

    @property
    def states(self) -> tuple[Port, ...]:
        """What the mixer keeps from call to call."""
        raise NotImplementedError

    def host(self, tokens: int) -> tuple[Port, ...]:
        """What it asks of the host beside the stream."""
        raise NotImplementedError

    def rank(self, path: str) -> int:
        return dict(self.ranks).get(path, 0)

    def rows(self) -> Iterator[Row]:
        """The block's parameters, in its own order."""
        if self.entry:
            yield from entry_rows(self.d_model)
        yield from with_directions(self.mixer.rows(self.d_model), dict(self.ranks))
        if self.affine:
            yield from residual_rows(self.d_model)

    def ports(self, tokens: int) -> Ports:
        stream = Port("x", (1, self.d_model, 1, tokens), STREAM)
        ports = Ports((stream, *self.host(tokens)), (replace(stream, name="y"),))
        return with_states(ports, self.states, self.explicit)


class Mixer(Block):
    """`y = residual(x, mix(norm(x)))`, and what it keeps."""

    config: MixerConfig

    def __init__(self, config: MixerConfig):
        super().__init__()
        self.config = config
        if config.entry:
            self.entry = Entry(config.d_model)
        self.norm = RmsNorm(config.d_model, config.norm.eps)
        self.add_projections()
        self.residual = residual(config.d_model, config.affine)

    def add_projections(self) -> None:
        """Make the parameters of `mix`."""
        raise NotImplementedError

    def mix(self, h: Tensor, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """What the mixer adds for the normed stream `h`, both `(1, d, 1, T)`, and what it keeps
        now, by name."""
        raise NotImplementedError

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        x = inputs["x"]
        if self.config.entry:
            x = self.entry(x)
        added, kept = self.mix(self.norm(x), inputs)
        outputs = {"y": self.residual(x, added)}
        if self.config.explicit:
            outputs |= {f"{name}_out": value for name, value in kept.items()}
        return outputs


def with_states(ports: Ports, states: tuple[Port, ...], explicit: bool) -> Ports:
    """`ports` with the `states` of a part: Core ML's own, or inputs and outputs beside the
    others."""
    if not explicit:
        return replace(ports, states=states)
    written = (replace(state, name=f"{state.name}_out") for state in states)
    return Ports((*ports.inputs, *states), (*ports.outputs, *written))
