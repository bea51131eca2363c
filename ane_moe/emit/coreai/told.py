"""What the metadata of an asset tells of its weights, so that they can be read again: types, shapes
and expansions, as JSON, and the arrays of the program by name.

The name of an array is a digest of its bytes: of those that are equal, whatever their types,
Apple's writer keeps one, under the name of any of them.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ane_moe.formats.encoded import Encoded, Expansion, Stored
from ane_moe.mlprogram.storage import STORAGE, decode, encode

Weight = np.ndarray | Encoded
NAME_LENGTH = 32  # hexadecimal digits


class Packed:
    """The bytes of a stored array, a copy, and what an asset calls them."""

    def __init__(self, stored: Stored):
        self.type, self.shape = stored.type, stored.values.shape
        self.bytes = np.array(encode(STORAGE[stored.type], stored.values))
        self.name = hashlib.sha256(self.bytes.data).hexdigest()[:NAME_LENGTH]

    @property
    def told(self) -> list[Any]:
        return [self.type, list(self.shape), self.name]


def by_name(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of a program as weights call them: MLIR puts a number behind a name that it has
    already."""
    return {name[:NAME_LENGTH]: array for name, array in arrays.items()}


def told_of(expansion: Expansion, packed: Mapping[str, Packed]) -> dict[str, Any]:
    """An expansion as JSON; its stored inputs are `packed`."""
    inputs = {
        part: packed[part].told if isinstance(value, Stored) else list(value)
        for part, value in expansion.inputs.items()
    }
    outputs = [[type_, list(shape)] for type_, shape in expansion.outputs]
    integers = dict(expansion.integers)
    return {"type": expansion.type, "inputs": inputs, "outputs": outputs, "integers": integers}


def weight_of(told: Any, arrays: Mapping[str, np.ndarray]) -> Weight:
    """The weight that was told of, with its numbers out of `arrays`: those of one that is stored
    as it is, or by its expansions.

    Raises ValueError, KeyError or TypeError where they do not fit.
    """
    if isinstance(told[0], str):
        return _stored(told, arrays).values
    expansions = []
    for one in told:
        inputs = {part: _input(facts, arrays) for part, facts in one["inputs"].items()}
        outputs = tuple((str(type_), tuple(map(int, shape))) for type_, shape in one["outputs"])
        expansions.append(Expansion(str(one["type"]), inputs, outputs, dict(one["integers"])))
    return Encoded(tuple(expansions))


def _input(facts: Any, arrays: Mapping[str, np.ndarray]) -> Stored | tuple[int, int]:
    if isinstance(facts[0], int):
        return facts[0], int(facts[1])
    return _stored(facts, arrays)


def _stored(facts: Any, arrays: Mapping[str, np.ndarray]) -> Stored:
    type_, shape, name = str(facts[0]), tuple(map(int, facts[1])), facts[2]
    count = int(np.prod(shape, dtype=np.int64))
    return Stored(decode(STORAGE[type_], arrays[name], count).reshape(shape), type_)
