"""Consecutive layers in one graph: one call of the host in place of two for each layer."""

from torch import Tensor, nn

from ane_moe.model.mixer import MixerConfig
from ane_moe.model.moe import MoeConfig
from ane_moe.model.stack import FfnConfig, StackConfig
from ane_moe.parts.block import Block
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
        self.parallel = mixer is not None and mixer.alone


class Stack(Block):
    """`y` after all layers. `gates_0`, `gates_1`, ... are the exact gates of those layers that have
    experts."""

    config: StackConfig

    def __init__(self, config: StackConfig):
        super().__init__()
        self.config = config
        self._each = [StackedLayer(*layer) for layer in config.layers]
        self.layers = nn.ModuleList(self._each)
        self.one_trace = all(layer.attn is None or layer.attn.one_trace for layer in self._each)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = {}
        x, carried = inputs["x"], {name: inputs[name] for name in ("carry",) if name in inputs}
        lent: dict[str, Tensor] = {}
        for place, layer in enumerate(self._each):
            kept = {name: inputs[f"{name}_{place}"] for name in layer.kept}
            given = inputs | lent | kept | {"x": x}
            attended = layer.attn(**given) if layer.attn else {"y": x}
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
        return outputs | {"y": x}
