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
    first one `lends`, the others read its caches, inside the graph."""

    layers: tuple[StackedConfig, ...]
    lends: bool = False

    def rows(self) -> Iterator[Row]:
        """The block's parameters, in its own order."""
        for index, (mixer, ffn) in enumerate(self.layers):
            for half, config in (("attn", mixer), ("ffn", ffn)):
                own = () if config is None else config.rows()
                yield from (row.under(f"layers.{index}.{half}") for row in own)

    def asked(self, tokens: int) -> dict[str, Port]:
        """What is asked of the host, by its slot. Names that stand for several slots are told
        apart by the place of the layer that asks first."""
        asked: dict[str, Port] = {}
        for place, mixer in _mixers(self.layers).items():
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
        mixers = _mixers(self.layers)
        ffns = {place: ffn for place, (_, ffn) in enumerate(self.layers) if ffn is not None}
        stream, *_ = next(half for half in self.layers[0] if half is not None).ports(tokens).inputs
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
            for place, ports in enumerate(each)
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
        return with_states(ports, tuple(states), any(one.explicit for one in mixers.values()))


@dataclass(frozen=True)
class PackedConfig(StackConfig):
    """The tracks of a block side by side: each has an equal run of the layers and begins with the
    stream, and they meet in the graph."""

    tracks: int = 1
    reduce: Literal["mean", "sum"] = "mean"


def _numbered(port: Port, place: int) -> Port:
    """The port of a layer within a stack."""
    return replace(port, name=f"{port.name}_{place}", slot=port.slot.replace("{0}", f"{{{place}}}"))
