"""Consecutive layers in one graph, as data."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ane_moe.model.mixer import MixerConfig, with_states
from ane_moe.model.mlp import DenseConfig
from ane_moe.model.moe import MoeConfig
from ane_moe.model.port import STATE, Port, Ports
from ane_moe.model.weight import Row

FfnConfig = DenseConfig | MoeConfig
StackedConfig = tuple[MixerConfig | None, FfnConfig | None]


def can_share(layers: Sequence[StackedConfig]) -> bool:
    """Whether layers can be one graph: what they ask of the host by one name has to be one
    thing; and what they keep is kept in one way."""
    asked: dict[str, Port] = {}
    mixers = _mixers(layers).values()
    return len({mixer.explicit for mixer in mixers}) < 2 and all(
        asked.setdefault(port.name, port) == port for mixer in mixers for port in mixer.host(1)
    )


def _mixers(layers: Sequence[StackedConfig]) -> dict[int, MixerConfig]:
    """By the place of the layer, where it has one."""
    return {place: mixer for place, (mixer, _) in enumerate(layers) if mixer is not None}


@dataclass(frozen=True)
class StackConfig:
    """(mixer, feed-forward) of each layer. What layers ask of the host alike they share. Where the
    first one `lends`, the others read its caches, inside the graph. Functions in `runs` (name,
    first layer, last + 1) go through some of the layers; `run` are those of this graph (None: all).
    Where that leaves out the one that lends, its caches are read as earlier calls left them."""

    layers: tuple[StackedConfig, ...]
    lends: bool = False
    runs: tuple[tuple[str, int, int], ...] = ()
    run: tuple[int, int] | None = None

    @property
    def places(self) -> range:
        """The layers that the graph goes through."""
        return range(*self.run) if self.run else range(len(self.layers))

    def of(self, name: str) -> "StackConfig":
        """What the function of this name goes through."""
        run = next(((first, end) for own, first, end in self.runs if own == name), None)
        return replace(self, runs=(), run=run)

    @property
    def borrowed(self) -> tuple[Port, ...]:
        """The caches that it reads of a layer that it does not go through, as that one has them."""
        lender = self.layers[0][0]
        if not self.lends or not self.places.start or lender is None:
            return ()
        return tuple(_numbered(port, 0) for port in lender.states)

    @property
    def _mixers(self) -> dict[int, MixerConfig]:
        own = _mixers(self.layers)
        return {place: mixer for place, mixer in own.items() if place in self.places}

    def rows(self) -> Iterator[Row]:
        """The block's parameters, in its own order."""
        for index in self.places:
            mixer, ffn = self.layers[index]
            for half, config in (("attn", mixer), ("ffn", ffn)):
                own = () if config is None else config.rows()
                yield from (row.under(f"layers.{index}.{half}") for row in own)

    def asked(self, tokens: int) -> dict[str, Port]:
        """What is asked of the host, by its slot. Names that stand for several slots are told
        apart by the place of the layer that asks first."""
        asked: dict[str, Port] = {}
        for place, mixer in self._mixers.items():
            taken = {port.name for port in asked.values()}
            for port in mixer.host(tokens):
                name = f"{port.name}_{place}" if port.name in taken else port.name
                asked.setdefault(port.slot, replace(port, name=name))
        return asked

    def given(self, place: int) -> dict[str, str]:
        """The stack's names of what a layer asks of the host, by its own; calls of one token may
        lack some of it."""
        asked, mixer = self.asked(2), self.layers[place][0]
        own = mixer.host(2) if mixer else ()
        return {port.name: asked[port.slot].name for port in own}

    def ports(self, tokens: int) -> Ports:
        """What is asked of the host once; states and gates of each layer with its place in the
        name."""
        mixers, first = self._mixers, self.layers[self.places.start]
        whole = {place: self.layers[place][1] for place in self.places}
        ffns = {place: ffn for place, ffn in whole.items() if ffn is not None}
        stream, *_ = next(half for half in first if half is not None).ports(tokens).inputs
        asked = self.asked(tokens)
        if self.lends:
            asked = {slot: port for slot, port in asked.items() if port.root != STATE}
        each = [ffn.ports(tokens) for ffn in ffns.values()]
        states = [
            _numbered(port, place) for place, mixer in mixers.items() for port in mixer.states
        ]
        gates = [
            _numbered(port, place)
            for place, ports in zip(ffns, each, strict=True)
            for port in ports.outputs
            if port.root == "gates"
        ]
        noise = [
            _numbered(port, place)
            for place, ports in zip(ffns, each, strict=True)
            for port in ports.inputs
            if port.root == "noise"
        ]
        # What routers hand on comes in at the first layer that takes it, and goes out at the last
        # that gives it.
        taken = [port for ports in each[:1] for port in ports.inputs if port.root == "carry"]
        given = {
            port.slot: port for ports in each for port in ports.outputs if port.root == "carry"
        }
        ports = Ports(
            (stream, *asked.values(), *taken, *noise),
            (replace(stream, name="y"), *gates, *given.values()),
        )
        explicit = any(one.explicit for one in mixers.values())
        if explicit:
            ports = replace(ports, inputs=(*ports.inputs, *self.borrowed))
        else:
            states = [*self.borrowed, *states]
        return with_states(ports, tuple(states), explicit)


@dataclass(frozen=True)
class PackedConfig(StackConfig):
    """The tracks of a block side by side: each has an equal run of the layers and begins with the
    stream, and they meet in the graph."""

    tracks: int = 1
    reduce: Literal["mean", "sum"] = "mean"


def _numbered(port: Port, place: int) -> Port:
    """The port of a layer within a stack."""
    return replace(port, name=f"{port.name}_{place}", slot=port.slot.replace("{0}", f"{{{place}}}"))
