"""A mixer and routing in one call, or routing alone: what the host needs to dispatch a layer's
experts."""

from torch import Tensor, nn

from ane_moe.model.routed import RoutedMixerConfig, RoutingConfig
from ane_moe.parts.block import Block
from ane_moe.parts.early import make_early
from ane_moe.parts.latent import make_entering
from ane_moe.parts.norm import make_norm
from ane_moe.parts.registry import make_mixer
from ane_moe.parts.residual import kept, norm_before, unnormed_residual
from ane_moe.parts.router import idle_share, make_router


class Routing(nn.Module):
    """The normed input of the experts, their exact gates, and the stream that they add to."""

    def __init__(self, config: RoutedMixerConfig):
        super().__init__()
        d = config.mixer.d_model
        spec = config.residual
        self.norm = norm_before(d, config.mixer.norm, spec)
        self.apart, self.normed = spec.norms != "before", spec.norms != "after"
        self.router_norm = make_norm(d, config.mixer.norm) if config.router_norm else None
        self.router, self.hands_on = make_router(d, config.router), spec.hands_on
        self.spec = config.router
        self.residual, self.keeps = unnormed_residual(d, spec), spec.keeps
        self.early = make_early(d, config.mixer.norm.eps, config.early)

    def forward(
        self, x: Tensor, inputs: dict[str, Tensor], mixed: Tensor | None = None
    ) -> dict[str, Tensor]:
        """`mixed`: the stream with what a mixer beside adds, which comes nearer to later ones."""
        # Without a norm, one value would be two outputs, of which a program has but one.
        h = self.norm(x) if self.normed else x + x * 0
        read = h if self.router_norm is None else self.router_norm(x)
        gates, handed_on = self.router.gates(read, inputs)
        base = self.residual.without(kept(x, h, self.keeps))
        outputs = {"ffn_input": h, "gates": gates, "y": base, **handed_on}
        if self.hands_on:
            (outputs["later"],) = idle_share(h, gates, self.spec) or [x * 0]
        if self.early is not None:
            outputs["guess"] = self.early(base if mixed is None else mixed)
        return outputs | {"added": x * 0} if self.apart else outputs


class RoutedMixer(Block):
    """`y = x + mix(norm(x))`, and the feed-forward norm and router on `y`; on `x` where the halves
    of the layer are parallel."""

    config: RoutedMixerConfig

    def __init__(self, config: RoutedMixerConfig):
        super().__init__()
        self.config = config
        self.attn = make_mixer(config.mixer)
        self.one_trace = self.attn.one_trace
        self.ffn = Routing(config)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = self.attn(**inputs)
        if self.config.residual.parallel:
            return self.ffn(inputs["x"], inputs, outputs["y"]) | outputs
        return outputs | self.ffn(outputs["y"], inputs)


class NormAndRouter(nn.Module):
    """What experts are given, the normed stream or a latent of it, and their exact gates."""

    def __init__(self, config: RoutingConfig):
        super().__init__()
        self.norm = make_norm(config.d_model, config.norm)
        self.router = make_router(config.d_model, config.router)
        self.latent_in = None
        if config.latent is not None:
            self.latent_in = make_entering(config.d_model, config.latent, config.latent_ranks)
        self.early = make_early(config.d_model, config.norm.eps, config.early)

    def forward(self, x: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        h = self.norm(x)
        gates, handed_on = self.router.gates(h, inputs)
        guess = {} if self.early is None else {"guess": self.early(x)}
        outputs = {"gates": gates, **handed_on, **guess}
        if self.latent_in is None:
            return outputs | {"ffn_input": h}
        latent = self.latent_in(h)
        return outputs | {"ffn_input": latent, "added": latent * 0}


class RoutingAlone(Block):
    """Of a layer without a mixer."""

    config: RoutingConfig

    def __init__(self, config: RoutingConfig):
        super().__init__()
        self.config = config
        self.ffn = NormAndRouter(config)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = self.ffn(inputs["x"], inputs)
        return outputs
