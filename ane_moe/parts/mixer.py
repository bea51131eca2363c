"""What all mixers have in common: the norm before, the residual after, and what they keep."""

from torch import Tensor

from ane_moe.model.mixer import MixerConfig
from ane_moe.parts.block import Block
from ane_moe.parts.residual import Entry, kept, make_residual, norm_before


class Mixer(Block):
    """`y = residual(x, mix(norm(x)))`, or `mix(norm(x))` alone, and what it keeps."""

    config: MixerConfig

    def __init__(self, config: MixerConfig):
        super().__init__()
        self.config = config
        if config.entry:
            self.entry = Entry(config.d_model)
        facts = (config.d_model, config.norm, config.residual)
        self.norm = norm_before(*facts)
        self.add_projections()
        self.residual = make_residual(*facts)

    def add_projections(self) -> None:
        """Make the parameters of `mix`."""
        raise NotImplementedError

    def mix(self, h: Tensor, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """What the mixer adds for the normed stream `h`, both `(1, d, 1, T)`, and what it keeps
        now, by name."""
        raise NotImplementedError

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        x = inputs["x"]
        if self.config.entry:
            x = self.entry(x)
        h = self.norm(x)
        added, states = self.mix(h, inputs)
        spec = self.config.residual
        alone, base = spec.parallel, kept(x, h, spec.keeps)
        kept_now = {f"{name}_out": value for name, value in states.items()}
        return {"y": added if alone else self.residual(base, added), **kept_now}
