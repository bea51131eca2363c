"""The projections around experts that work on a latent."""

from ane_moe.model.latent import LatentRanks
from ane_moe.model.spec import LatentSpec
from ane_moe.parts.projection import Projection


def make_entering(d_model: int, latent: LatentSpec, ranks: LatentRanks) -> Projection:
    """`(1, d, 1, T) -> (1, r, 1, T)`, what experts are given."""
    return Projection(d_model, latent.width, latent.bias, rank=ranks[0])


def make_leaving(d_model: int, latent: LatentSpec, ranks: LatentRanks) -> Projection:
    """`(1, r, 1, T) -> (1, d, 1, T)`, of their sum."""
    return Projection(latent.width, d_model, latent.bias, rank=ranks[1])
