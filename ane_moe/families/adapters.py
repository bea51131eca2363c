"""What an adapter adds to which of our tensors.

Its modules have the names that transformers gives them, of any of the forms in which a checkpoint
may be stored: those of a family's key table.
"""

from collections.abc import Iterator, Mapping

from ane_moe.checkpoints.adapter import MERGED_INSTEAD, Adapter, Added, LowRank, require_used
from ane_moe.checkpoints.checkpoint import TensorSource
from ane_moe.errors import UserError
from ane_moe.families import load_family
from ane_moe.families.keys import places
from ane_moe.model.spec import ModelSpec
from ane_moe.model.weight import EMBEDDING, HEAD, WeightName
from ane_moe.wording import listed

Sources = Mapping[WeightName, TensorSource]


def adapted(adapter: Adapter, spec: ModelSpec, sources: Sources) -> dict[WeightName, LowRank]:
    """What the adapter adds to the model, by our names. Raises UserError where a matrix of it finds
    no place, or its place is head and embedding at once."""
    found = dict(_found(adapter, spec))
    require_used(adapter, {low_rank.pair for low_rank in found.values()})
    ends = {sources[name].key for name in (EMBEDDING, HEAD)}
    if len(ends) == 1 and (HEAD in found or ends & adapter.saved.keys()):
        raise UserError(
            f"{adapter.folder} adapts the head or the embedding, which are one tensor here",
            ends.pop(),
            "untie them and save the model again, or train without these modules",
        )
    return found


def switchable(adapter: Adapter, spec: ModelSpec, sources: Sources) -> dict[WeightName, LowRank]:
    """The same of an adapter that stays beside the weights: it may have no whole tensors."""
    if adapter.saved:
        what = f"{adapter.folder} cannot be switched: it has whole tensors of its own"
        raise UserError(what, listed(adapter.saved), MERGED_INSTEAD)
    return adapted(adapter, spec, sources)


def added(low_ranks: Mapping[WeightName, LowRank], sources: Sources) -> list[Added]:
    """Where that goes in the checkpoint."""
    return [Added(sources[name], low_rank) for name, low_rank in low_ranks.items()]


def _found(adapter: Adapter, spec: ModelSpec) -> Iterator[tuple[WeightName, LowRank]]:
    table = load_family(spec.family).KEYS
    for name, weight in spec.weights():
        if len(weight.shape) < 2 or name == EMBEDDING:
            continue
        places_of = places(spec, name, weight, table)
        told = (adapter.find(place) for place in places_of)
        if low_rank := next(filter(None, told), None):
            yield name, low_rank
