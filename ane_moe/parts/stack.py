"""Consecutive layers in one graph: one call of the host in place of two for each layer."""

from collections.abc import Iterable

from torch import Tensor, nn

from ane_moe.model.mixer import MixerConfig
from ane_moe.model.moe import MoeConfig
from ane_moe.model.stack import FfnConfig, PackedConfig, StackConfig
from ane_moe.parts.block import Block
from ane_moe.parts.experts import tree_sum
from ane_moe.parts.mlp import Dense
from ane_moe.parts.moe import Moe
from ane_moe.parts.registry import make_mixer


class StackedLayer(nn.Module):
    """Mixer and feed-forward of one layer, or one of them."""

    def __init__(self, mixer: MixerConfig | None, ffn: FfnConfig | None):
        super().__init__()
        self.attn = None if mixer is None else make_mixer(mixer)
        self.ffn = None if ffn is None else Moe(ffn) if isinstance(ffn, MoeConfig) else Dense(ffn)
        self.kept = [] if mixer is None else [port.name for port in mixer.states]
        self.parallel = mixer is not None and mixer.residual.parallel


class Stack(Block):
    """`y` after all layers. `gates_0`, `gates_1`, ... are the exact gates of those layers that have
    experts."""

    config: StackConfig

    def __init__(self, config: StackConfig):
        super().__init__()
        self.config = config
        self._each = {place: StackedLayer(*config.layers[place]) for place in config.places}
        self.layers = nn.ModuleDict({str(place): layer for place, layer in self._each.items()})
        self._given = {place: config.given(place) for place in config.places}
        layers = self._each.values()
        self.one_trace = all(layer.attn is None or layer.attn.one_trace for layer in layers)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        x, outputs = self.run(self.config.places, inputs)
        return outputs | {"y": x}

    def run(
        self, places: Iterable[int], inputs: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the layers at these places make of `x`, and their other outputs."""
        outputs: dict[str, Tensor] = {}
        x, carried = inputs["x"], {name: inputs[name] for name in ("carry",) if name in inputs}
        borrowed = (port.name for port in self.config.borrowed)
        lent = {name.removesuffix("_0"): inputs[name] for name in borrowed}
        for place in places:
            layer, names = self._each[place], self._given[place].items()
            kept = {name: inputs[f"{name}_{place}"] for name in layer.kept}
            asked = {own: inputs[name] for own, name in names if name in inputs}
            attended = layer.attn(x=x, **asked, **lent, **kept) if layer.attn else {"y": x}
            if self.config.lends and not place:
                lent = {name: attended[f"{name}_out"] for name in layer.kept}
            noise = {"noise": inputs[f"noise_{place}"]} if f"noise_{place}" in inputs else {}
            between = {"x": x, "added": attended["y"]} if layer.parallel else {"x": attended["y"]}
            fed = layer.ffn(**between, **carried, **noise) if layer.ffn else {"y": attended["y"]}
            x = fed["y"]
            numbered = {f"{name}_{place}_out": attended.get(f"{name}_out") for name in layer.kept}
            numbered[f"gates_{place}"] = fed.get("gates")
            outputs |= {name: value for name, value in numbered.items() if value is not None}
            if "carry_out" in fed:
                carried = {"carry": fed["carry_out"]}
                outputs["carry_out"] = fed["carry_out"]
        return x, outputs


class Packed(Stack):
    """`y` after the tracks of a block have met."""

    config: PackedConfig

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        count, outputs = self.config.tracks, dict[str, Tensor]()
        depth, streams = len(self._each) // count, []
        for track in range(count):
            x, more = self.run(range(track * depth, (track + 1) * depth), inputs)
            # Divided first: a sum of many streams may be beyond fp16 where their mean is not.
            streams.append(x * (1 / count) if self.config.reduce == "mean" else x)
            outputs |= more
        return outputs | {"y": tree_sum(streams)}
