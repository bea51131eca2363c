"""Consecutive layers in one graph: one call of the host in place of two for each layer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ane_moe.model.port import Port, Ports
from ane_moe.model.weight import Row
from ane_moe.parts.block import Block
from ane_moe.parts.mixer import MixerConfig, with_states
from ane_moe.parts.mlp import Dense, DenseConfig
from ane_moe.parts.moe import Moe, MoeConfig
from ane_moe.parts.registry import make_mixer

StackedConfig = tuple[MixerConfig, DenseConfig | MoeConfig]


def can_share(layers: Sequence[StackedConfig]) -> bool:
    """Whether layers can be one graph: what they ask of the host by one name has to be one
    thing."""
    asked: dict[str, Port] = {}
    return all(
        asked.setdefault(port.name, port) == port for mixer, _ in layers for port in mixer.host(1)
    )


@dataclass(frozen=True)
class StackConfig:
    """(mixer, feed-forward) of each layer. The layers share what they ask of the host
    (`can_share`)."""

    layers: tuple[StackedConfig, ...]

    def rows(self) -> Iterator[Row]:
        """The block's parameters, in its own order."""
        for index, (mixer, ffn) in enumerate(self.layers):
            yield from (row.under(f"layers.{index}.attn") for row in mixer.rows())
            yield from (row.under(f"layers.{index}.ffn") for row in ffn.rows())

    def ports(self, tokens: int) -> Ports:
        """What is asked of the host once; states and gates of each layer with its place in the
        name."""
        first = self.layers[0][0]
        stream, *_ = first.ports(tokens).inputs
        asked = {port.name: port for mixer, _ in self.layers for port in mixer.host(tokens)}
        each = [ffn.ports(tokens) for _, ffn in self.layers]
        states = [
            _numbered(port, place)
            for place, (mixer, _) in enumerate(self.layers)
            for port in mixer.states
        ]
        gates = [
            _numbered(port, place)
            for place, ports in enumerate(each)
            for port in ports.outputs
            if port.root == "gates"
        ]
        # What routers hand on comes in at the first layer that takes it, and goes out at the last
        # that gives it.
        taken = [port for port in each[0].inputs if port.root == "carry"]
        given = {
            port.slot: port for ports in each for port in ports.outputs if port.root == "carry"
        }
        ports = Ports(
            (stream, *asked.values(), *taken), (replace(stream, name="y"), *gates, *given.values())
        )
        return with_states(ports, tuple(states), first.explicit)


def _numbered(port: Port, place: int) -> Port:
    """The port of a layer within a stack."""
    return replace(port, name=f"{port.name}_{place}", slot=port.slot.replace("{0}", f"{{{place}}}"))


class StackedLayer(nn.Module):
    """Mixer and feed-forward of one layer."""

    def __init__(self, mixer: MixerConfig, ffn: DenseConfig | MoeConfig):
        super().__init__()
        self.attn = make_mixer(mixer)
        self.ffn = Moe(ffn) if isinstance(ffn, MoeConfig) else Dense(ffn)
        self.kept = [port.name for port in mixer.states]


class Stack(Block):
    """`y` after all layers. `gates_0`, `gates_1`, ... are the exact gates of those layers that have
    experts."""

    config: StackConfig

    def __init__(self, config: StackConfig):
        super().__init__()
        self.config = config
        self._each = [StackedLayer(*layer) for layer in config.layers]
        self.layers = nn.ModuleList(self._each)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = {}
        x, carried = inputs["x"], {name: inputs[name] for name in ("carry",) if name in inputs}
        for place, layer in enumerate(self._each):
            kept = {name: inputs[f"{name}_{place}"] for name in layer.kept}
            attended = layer.attn(**(inputs | kept | {"x": x}))
            fed = layer.ffn(x=attended["y"], **carried)
            x = fed["y"]
            numbered = {f"{name}_{place}_out": attended.get(f"{name}_out") for name in layer.kept}
            numbered[f"gates_{place}"] = fed.get("gates")
            outputs |= {name: value for name, value in numbered.items() if value is not None}
            if "carry_out" in fed:
                carried = {"carry": fed["carry_out"]}
                outputs["carry_out"] = fed["carry_out"]
        return outputs | {"y": x}
