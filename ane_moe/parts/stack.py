"""Consecutive layers in one graph: one call of the host in place of two for each layer."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from ane_moe.model.weight import Row
from ane_moe.parts.attention import Attention, AttentionConfig
from ane_moe.parts.mlp import Dense, DenseConfig
from ane_moe.parts.moe import Moe, MoeConfig
from ane_moe.parts.ports import Block, Ports, Shape


@dataclass(frozen=True)
class StackConfig:
    """(attention, feed-forward) of each layer. The layers share masks and rotary rows: one window and one RoPE."""

    layers: tuple[tuple[AttentionConfig, DenseConfig | MoeConfig], ...]

    @property
    def caches(self) -> dict[str, Shape]:
        """The KV caches of all layers, named `k_cache_0`, `v_cache_0`, `k_cache_1`, ..."""
        return {f"{name}_{index}": shape for index, (attention, _) in enumerate(self.layers)
                for name, shape in attention.caches.items()}  # fmt: skip

    def rows(self) -> Iterator[Row]:
        """The block's parameters, in its own order."""
        for index, (attention, ffn) in enumerate(self.layers):
            yield from (row.under(f"layers.{index}.attn") for row in attention.rows())
            yield from (row.under(f"layers.{index}.ffn") for row in ffn.rows())


class StackedLayer(nn.Module):
    """Attention and feed-forward of one layer."""

    def __init__(self, attention: AttentionConfig, ffn: DenseConfig | MoeConfig):
        super().__init__()
        self.attn = Attention(attention)
        self.ffn = Moe(ffn) if isinstance(ffn, MoeConfig) else Dense(ffn)


class Stack(Block):
    """`y` after all layers. `gates_0`, `gates_1`, ... are the exact gates of those layers that have experts."""

    def __init__(self, config: StackConfig):
        super().__init__()
        self.config = config
        self._each = [StackedLayer(*layer) for layer in config.layers]
        self.layers = nn.ModuleList(self._each)

    def ports(self, tokens: int) -> Ports:
        first = self._each[0].attn.ports(tokens)
        own = self.config.layers[0][0].caches
        inputs = {name: shape for name, shape in first.inputs.items() if name not in own}
        outputs = {"y": first.outputs["y"]}
        for index, layer in enumerate(self._each):
            if "gates" in (ports := layer.ffn.ports(tokens).outputs):
                outputs[f"gates_{index}"] = ports["gates"]
        caches = self.config.caches
        if self.config.layers[0][0].explicit:
            return Ports(inputs | caches, outputs | {f"{name}_out": shape for name, shape in caches.items()})
        return Ports(inputs, outputs, caches)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        caches = self.config.caches
        shared = {name: value for name, value in inputs.items() if name not in caches}
        outputs: dict[str, Tensor] = {}
        x = inputs["x"]
        for index, layer in enumerate(self._each):
            mine = {name: inputs[f"{name}_{index}"] for name in ("k_cache", "v_cache")}
            attended = layer.attn(**(shared | mine | {"x": x}))
            fed = layer.ffn(x=attended["y"])
            x = fed["y"]
            outputs |= {f"gates_{index}": fed["gates"]} if "gates" in fed else {}
            outputs |= {f"{name}_{index}_out": attended[f"{name}_out"] for name in mine if f"{name}_out" in attended}
        return outputs | {"y": x}
