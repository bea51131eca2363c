"""What all mixers have in common, as data: parameters, what they keep, and their ports."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ane_moe.model.port import ADDED, STREAM, Port, Ports
from ane_moe.model.residual import PLAIN, ResidualSpec
from ane_moe.model.spec import (
    MixerSpec,
    NormSpec,
    entry_rows,
)
from ane_moe.model.weight import Row, with_directions


@dataclass(frozen=True)
class MixerConfig:
    """`rotary` is the number of rotated channel pairs r (0: no RoPE); `slots` the cache width S;
    `explicit` makes what is kept plain inputs and outputs instead of Core ML state. `ranks` are the
    directions kept apart from projections, by path. `entry` is LayerSpec's."""

    d_model: int
    norm: NormSpec
    mixer: MixerSpec
    rotary: int = 0
    slots: int = 0
    explicit: bool = False
    ranks: tuple[tuple[str, int], ...] = ()
    residual: ResidualSpec = PLAIN
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
        yield from self.residual.read_rows(self.norm, self.d_model)
        yield from with_directions(self.mixer.rows(self.d_model), dict(self.ranks))
        yield from self.residual.added_rows(self.norm, self.d_model)

    def ports(self, tokens: int) -> Ports:
        stream = Port("x", (1, self.d_model, 1, tokens), STREAM)
        result = replace(stream, name="y", slot=ADDED if self.residual.parallel else STREAM)
        ports = Ports((stream, *self.host(tokens)), (result,))
        return with_states(ports, self.states, self.explicit)


def with_states(ports: Ports, states: tuple[Port, ...], explicit: bool) -> Ports:
    """`ports` with the `states` of a part: Core ML's own, or inputs and outputs beside the
    others."""
    if not explicit:
        return replace(ports, states=states)
    written = (replace(state, name=f"{state.name}_out") for state in states)
    return Ports((*ports.inputs, *states), (*ports.outputs, *written))
