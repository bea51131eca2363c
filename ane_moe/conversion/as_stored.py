"""Which matrices of a quantised checkpoint are carried over as they are stored, and in which form.

Decided by what the headers say, before anything is read: a matrix is carried over where its codes
take less than fp16, and is fp16 else; nothing is quantised a second time.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

from ane_moe.checkpoints.checkpoint import Checkpoint, TensorSource
from ane_moe.checkpoints.stored_tensor import Pieces
from ane_moe.formats.as_stored import AsStored, smallest
from ane_moe.formats.encoders import AS_STORED
from ane_moe.formats.recipe import Recipe
from ane_moe.model.weight import WeightName

Sources = Mapping[WeightName, TensorSource]

PLAIN = "not quantised in the checkpoint"
MIXED = "its blocks are more than scales and codes"
DEAR = "its scales, or the palettes that it needs, would take more than fp16"


def with_stored_forms(recipe: Recipe, checkpoint: Checkpoint, sources: Sources) -> Recipe:
    """The recipe with a form for each tensor that it wants as stored."""
    wanted = _wanted(recipe, sources)
    forms = {str(source.name): form_of(checkpoint, source) for source in wanted}
    named = {n: form.name if isinstance(form, AsStored) else "fp16" for n, form in forms.items()}
    return replace(recipe, overrides=named | dict(recipe.overrides)) if named else recipe


def notes(recipe: Recipe, checkpoint: Checkpoint, sources: Sources) -> Iterator[str]:
    """A sentence for each role that the recipe wants as stored: in which form, or why not."""
    roles: dict[str, Counter[str]] = {}
    for source in _wanted(recipe, sources):
        form = form_of(checkpoint, source)
        what = form.name if isinstance(form, AsStored) else f"fp16 ({form})"
        roles.setdefault(str(source.role), Counter())[what] += 1
    for role, found in sorted(roles.items()):
        listed = ", ".join(f"{count} as {what}" for what, count in sorted(found.items()))
        yield f"{AS_STORED}: {role}: {listed}"


def form_of(checkpoint: Checkpoint, source: TensorSource) -> AsStored | str:
    """The form in which a tensor is carried over, or why it is not."""
    codec = checkpoint.tensors[source.key].codec
    if codec is None:
        return PLAIN
    if (pieces := codec.pieces) is None or source.stack:
        return MIXED
    rows, columns = source.shape
    block = _block(pieces, source)
    scaled, zeros = pieces.scales is not None, pieces.zeros is not None
    form = smallest(pieces.values, (rows, columns), block, scaled, zeros)
    return form if form.stored_bytes(rows, columns) < 2 * rows * columns else DEAR


def _wanted(recipe: Recipe, sources: Sources) -> list[TensorSource]:
    named = sources.values()
    return [source for source in named if recipe.of_stored(source.name, source.role)]


def _block(pieces: Pieces, source: TensorSource) -> tuple[int, int]:
    """Rows and columns of our tensor that are sure to have one scale: blocks of the stored one, as
    far as they are not cut."""
    height, width = source.region_shape
    first_row, (first, _, step) = (source.rows or (0, 0))[0], source.columns or (0, 0, 1)
    down = math.gcd(pieces.height, first_row, height) if pieces.height else height
    if source.pairs or source.runs:  # rows in another order
        down = 1 if pieces.height != 0 and pieces.height < height else down
    count = width if source.columns is None else len(range(*source.columns))
    across = count
    if pieces.width:
        across = math.gcd(pieces.width, first, count) if step == 1 else 1
    block = (across, down) if source.transpose else (down, across)
    return math.gcd(block[0], source.shape[0]), math.gcd(block[1], source.shape[1])
