"""What the metadata of an asset tells of its weights, so that they can be read again: types, shapes
and expansions, as JSON, and the arrays of the program by name.

Of arrays that are equal, whatever their types, Apple's writer keeps one, under the name of any of
them: so equal arrays have one name here.
"""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ane_moe.formats.encoded import Encoded, Expansion, Stored
from ane_moe.mlprogram.storage import STORAGE, decode, encode, stored_size

Weight = np.ndarray | Encoded


@dataclass(frozen=True)
class Packed:
    """The bytes of a stored array, and what an asset calls them."""

    type: str
    shape: tuple[int, ...]
    name: str
    bytes: np.ndarray

    @property
    def told(self) -> list[Any]:
        return [self.type, list(self.shape), self.name]


@dataclass
class Arrays:
    """The arrays of one asset, numbered as they come."""

    _known: dict[tuple[int, int], list[Packed]] = field(default_factory=dict)
    _count: int = 0

    def add(self, stored: Stored) -> Packed:
        """A copy of the array, packed; in the place of one that is equal, if there is any."""
        packed = encode(STORAGE[stored.type], stored.values)
        alike = self._known.setdefault((packed.size, zlib.crc32(packed.data)), [])
        shape = stored.values.shape
        for other in alike:
            if np.array_equal(other.bytes, packed):
                return Packed(stored.type, shape, other.name, other.bytes)
        alike.append(Packed(stored.type, shape, f"array{self._count:06d}", np.array(packed)))
        self._count += 1
        return alike[-1]


def by_name(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of a program as weights call them: MLIR puts a number behind a name that it has
    already."""
    return {name.partition("_")[0]: array for name, array in arrays.items()}


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

    Raises errors of Python's (`UNFIT` of asset.py) where they do not fit.
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
    storage, count, raw = STORAGE[type_], math.prod(shape), arrays[name]
    if min(shape, default=1) < 0 or stored_size(storage, count) != raw.size:
        raise ValueError(f"{shape} of {type_} in {raw.size} bytes")
    return Stored(decode(storage, raw, count).reshape(shape), type_)
