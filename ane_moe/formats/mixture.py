"""Two formats mixed, matrix by matrix, so that the whole takes a given number of bits a weight.

Apple's server model is stored at 3.56 bits a weight, by textures that Core ML does not have, with
the strongest directions of each matrix kept apart (its 2025 foundation model report). Nothing is
measured here: the matrices of experts, of which there are most and each token meets few, are the
first to take the smaller format, and the head is the last. `--budget-mb` measures.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ane_moe.errors import UserError
from ane_moe.formats.recipe import Recipe, find_format
from ane_moe.model.weight import WeightName

# Which give way first; roles that are not named do after the experts.
ORDER = ("experts.gate", "experts.up", "experts.down", "", "attention", "head")
GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it, without their whole part, fill 0 to 1 evenly


def with_mixed_formats(recipe: Recipe, sources: Mapping[WeightName, Any]) -> Recipe:
    """The recipe with the smaller format of its mixture for as many of the tensors as it takes;
    `sources` have a `shape` and a `role`.

    Raises UserError where all of them in the smaller format take more than the bits asked for.
    """
    if recipe.mixture is None:
        return recipe
    choices = {name: recipe.choice(name, source.role) for name, source in sources.items()}
    mixed = [
        name
        for name in _ordered(sources)
        if choices[name].format != "fp16" and not recipe.of_stored(name, sources[name].role)
    ]

    def stored_bytes(name: WeightName, form: str) -> int:
        rows, columns = shape = sources[name].shape
        apart = 2 * choices[name].directions(shape) * (rows + columns)
        return find_format(form).stored_bytes(rows, columns) + apart

    below, bits = recipe.mixture.below, recipe.mixture.bits
    weights = sum(math.prod(sources[name].shape) for name in mixed)
    total = sum(stored_bytes(name, choices[name].format) for name in mixed)
    overrides = dict(recipe.overrides)
    for name in mixed:
        if 8 * total <= bits * weights:
            break
        total += stored_bytes(name, below) - stored_bytes(name, choices[name].format)
        overrides[str(name)] = below
    if 8 * total > bits * weights:
        raise UserError(
            f"the recipe {recipe.name} cannot store this model at {bits:g} bits a weight",
            f"{8 * total / weights:.2f} bits with every matrix as {below}",
            "give more bits, or a lower --recover-rank",
        )
    return replace(recipe, overrides=overrides)


def _ordered(sources: Mapping[WeightName, Any]) -> list[WeightName]:
    """Tensors of packages that a recipe may compress, by role; those of one role evenly out of all
    layers."""
    roles: dict[str, list[WeightName]] = {}
    for name, source in sources.items():
        if source.role not in (None, "embedding"):
            roles.setdefault(source.role, []).append(name)
    return [
        name
        for role in sorted(roles, key=_place)
        for _, name in sorted((n * GOLDEN % 1, name) for n, name in enumerate(roles[role], 1))
    ]


def _place(role: str) -> int:
    named = (number for number, one in enumerate(ORDER) if one and role.startswith(one))
    return next(named, ORDER.index(""))
