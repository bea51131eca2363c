"""Consecutive layers in one graph: one call of the host in place of two for each layer."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ane_moe.model.port import Port, Ports
from ane_moe.model.weight import Row
from ane_moe.parts.attention import Attention, AttentionConfig, with_states
from ane_moe.parts.block import Block
from ane_moe.parts.mlp import Dense, DenseConfig
from ane_moe.parts.moe import Moe, MoeConfig

KEPT = ("k_cache", "v_cache")


@dataclass(frozen=True)
class StackConfig:
    """(attention, feed-forward) of each layer. The layers share masks and rotary rows: one window and one RoPE."""

    layers: tuple[tuple[AttentionConfig, DenseConfig | MoeConfig], ...]

    def rows(self) -> Iterator[Row]:
        """The block's parameters, in its own order."""
        for index, (attention, ffn) in enumerate(self.layers):
            yield from (row.under(f"layers.{index}.attn") for row in attention.rows())
            yield from (row.under(f"layers.{index}.ffn") for row in ffn.rows())

    def ports(self, tokens: int) -> Ports:
        """Masks and rotary rows once; caches and gates of each layer with its place in the name."""
        first = self.layers[0][0]
        outer = replace(first, explicit=False).ports(tokens)
        gates, caches = [], []
        for index, (attention, ffn) in enumerate(self.layers):
            caches += [_numbered(port, index) for port in attention.caches]
            inner = ffn.ports(tokens).outputs
            gates += [_numbered(port, index) for port in inner if port.root == "gates"]
        ports = Ports(outer.inputs, (*outer.outputs, *gates))
        return with_states(ports, tuple(caches), first.explicit)


def _numbered(port: Port, index: int) -> Port:
    """The port of a layer within a stack."""
    return replace(port, name=f"{port.name}_{index}", slot=port.slot.replace("{0}", f"{{{index}}}"))


class StackedLayer(nn.Module):
    """Attention and feed-forward of one layer."""

    def __init__(self, attention: AttentionConfig, ffn: DenseConfig | MoeConfig):
        super().__init__()
        self.attn = Attention(attention)
        self.ffn = Moe(ffn) if isinstance(ffn, MoeConfig) else Dense(ffn)


class Stack(Block):
    """`y` after all layers. `gates_0`, `gates_1`, ... are the exact gates of those layers that have experts."""

    config: StackConfig

    def __init__(self, config: StackConfig):
        super().__init__()
        self.config = config
        self._each = [StackedLayer(*layer) for layer in config.layers]
        self.layers = nn.ModuleList(self._each)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = {}
        x = inputs["x"]
        for index, layer in enumerate(self._each):
            kept = {name: inputs[f"{name}_{index}"] for name in KEPT}
            attended = layer.attn(**(inputs | kept | {"x": x}))
            fed = layer.ffn(x=attended["y"])
            x = fed["y"]
            numbered = {f"{name}_{index}_out": attended.get(f"{name}_out") for name in KEPT}
            numbered[f"gates_{index}"] = fed.get("gates")
            outputs |= {name: value for name, value in numbered.items() if value is not None}
        return outputs | {"y": x}
