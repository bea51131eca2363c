"""The projections around experts that work on a latent."""

from collections.abc import Iterator

from ane_moe.model.spec import LatentSpec
from ane_moe.model.weight import Row, with_directions

LatentRanks = tuple[int, int]  # directions kept apart from the projection into it, and out of it


def entering_rows(latent: LatentSpec, d_model: int, ranks: LatentRanks) -> Iterator[Row]:
    """The parameters of the projection into the latent."""
    return with_directions(latent.entering(d_model), {"latent_in": ranks[0]})


def leaving_rows(latent: LatentSpec, d_model: int, ranks: LatentRanks) -> Iterator[Row]:
    """The parameters of the one out of it."""
    return with_directions(latent.leaving(d_model), {"latent_out": ranks[1]})
