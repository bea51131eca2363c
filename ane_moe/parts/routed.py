"""A mixer and routing in one call: what the host needs to dispatch a layer's experts."""

from torch import Tensor, nn

from ane_moe.model.routed import RoutedMixerConfig
from ane_moe.parts.block import Block
from ane_moe.parts.norm import RmsNorm
from ane_moe.parts.registry import make_mixer
from ane_moe.parts.residual import residual
from ane_moe.parts.router import make_router


class Routing(nn.Module):
    """The normed input of the experts, their exact gates, and the stream that they add to."""

    def __init__(self, config: RoutedMixerConfig):
        super().__init__()
        d = config.mixer.d_model
        self.norm = RmsNorm(d, config.mixer.norm.eps)
        self.router = make_router(d, config.router)
        self.residual = residual(d, config.affine)

    def forward(self, x: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        h = self.norm(x)
        gates, handed_on = self.router.gates(h, inputs)
        return {"ffn_input": h, "gates": gates, "y": self.residual.without(x), **handed_on}


class RoutedMixer(Block):
    """`y = x + mix(norm(x))`, and the feed-forward norm and router on `y`."""

    config: RoutedMixerConfig

    def __init__(self, config: RoutedMixerConfig):
        super().__init__()
        self.config = config
        self.attn = make_mixer(config.mixer)
        self.ffn = Routing(config)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = self.attn(**inputs)
        return outputs | self.ffn(outputs["y"], inputs)
