"""What all mixers have in common: the norm before, the residual after, and what they keep."""

from torch import Tensor

from ane_moe.model.mixer import MixerConfig
from ane_moe.parts.block import Block
from ane_moe.parts.residual import Entry, kept, norms_of, residual


class Mixer(Block):
    """`y = residual(x, mix(norm(x)))`, or `mix(norm(x))` alone, and what it keeps."""

    config: MixerConfig

    def __init__(self, config: MixerConfig):
        super().__init__()
        self.config = config
        if config.entry:
            self.entry = Entry(config.d_model)
        self.norm, after = norms_of(config.norm, config.d_model, config.norms)
        self.add_projections()
        self.residual = residual(config.d_model, config.affine, after=after)

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
        alone, base = self.config.alone, kept(x, h, self.config.keeps)
        kept_now = {f"{name}_out": value for name, value in states.items()}
        return {"y": added if alone else self.residual(base, added), **kept_now}
