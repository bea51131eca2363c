"""How the experts of a layer will lie in their store."""

from collections.abc import Iterable

from ane_moe.errors import UserError
from ane_moe.expert_record import Record, StoredArray, StoredWeight, lay_out
from ane_moe.formats.stored_arrays import stored_arrays
from ane_moe.model.experts import parameter_shape

Formed = tuple[str, tuple[int, ...], str]  # of a weight: parameter, shape, the name of its format


def record_of(weights: Iterable[Formed]) -> Record:
    """The record of an expert with these weights. Raises UserError for a format whose size depends
    on the numbers."""
    return lay_out(_stored(*weight) for weight in weights)


def common_record(experts: Iterable[tuple[Formed, ...]], layer: int) -> Record:
    """The record of all `experts` of a layer. Raises UserError where their formats differ."""
    kinds = list(dict.fromkeys(experts))
    if len(kinds) != 1:
        formats = (sorted({form for _, _, form in kind}) for kind in kinds[:2])
        raise UserError(
            f"layer {layer}: a store holds all experts of a layer in the same formats",
            " and ".join("/".join(names) for names in formats),
            "give formats by role, without --budget-mb or --min-cosine",
        )
    return record_of(kinds[0])


def _stored(name: str, shape: tuple[int, ...], form: str) -> StoredWeight:
    rows, columns = shape if len(shape) == 2 else (1, *shape)
    kind, arrays = stored_arrays(form, rows, columns)
    placed = tuple(StoredArray(key, type_, size) for key, type_, size in arrays)
    return StoredWeight(name, parameter_shape(shape), kind, placed)
