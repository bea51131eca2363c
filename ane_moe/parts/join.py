"""What follows the parts of a layer whose sum is normed, or taken out of a latent, before it meets
the stream."""

from torch import Tensor

from ane_moe.model.join import JoinConfig
from ane_moe.parts.beside import Beside
from ane_moe.parts.experts import WithShared
from ane_moe.parts.latent import make_leaving
from ane_moe.parts.residual import make_residual, norm_before


class Join(WithShared):
    """`y = x + norm(added)`, where a dense MLP stands beside what experts added; where these work
    on a latent, `y = x + latent_out(added) + shared(norm(x))`."""

    config: JoinConfig

    def __init__(self, config: JoinConfig):
        super().__init__()
        self.config = config
        d, norm = config.d_model, config.norm
        if config.latent is not None:
            self.latent_out = make_leaving(d, config.latent, config.latent_ranks)
        if config.shared is not None:
            self.norm = norm_before(d, norm, config.residual)
            self.hold(d, config.shared, config.shared_ranks)
        if config.beside is not None:
            self.beside = Beside(d, norm, config.beside, config.ranks)
        self.residual = make_residual(d, norm, config.residual)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        x, added = inputs["x"], inputs["added"]  # (1, d, 1, T), and so wide as experts are
        if self.config.latent is not None:
            added = self.latent_out(added)
        if self.config.shared is not None:
            added = self.of_shared(self.norm(x)) + added
        if self.config.beside is not None:
            added = self.beside(x, added)
        return {"y": self.residual(x, added)}
