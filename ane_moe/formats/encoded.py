"""A weight as it is stored: arrays for the weight file, and the constexpr operations that expand
them (iOS 18)."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ane_moe.mlprogram.storage import STORAGE, stored_size

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """One array of the weight file, unpacked: uint8 for uint1 to uint8, int8 for int4 and int8,
    else float16."""

    values: np.ndarray
    type: str

    @property
    def stored_bytes(self) -> int:
        return stored_size(STORAGE[self.type], self.values.size)


@dataclass(frozen=True)
class Expansion:
    """One constexpr operation. An input is stored, or output j of the earlier expansion i, as (i,
    j).

    `outputs` are the types and shapes of what it gives; `integers` its immediate int32 inputs.
    """

    type: str
    inputs: Mapping[str, Stored | tuple[int, int]]
    outputs: tuple[tuple[str, Shape], ...]
    integers: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoded:
    """A weight `(rows, columns)`: the last output of the last expansion, of shape `(rows, columns,
    1, 1)`, fp16."""

    expansions: tuple[Expansion, ...]

    @property
    def arrays(self) -> tuple[dict[str, np.ndarray], ...]:
        """The stored arrays by name, for each expansion."""
        return tuple(
            {
                name: value.values
                for name, value in expansion.inputs.items()
                if isinstance(value, Stored)
            }
            for expansion in self.expansions
        )

    @property
    def stored_bytes(self) -> int:
        """Payload in the weight file: indices, palettes, scales and masks, packed."""
        return sum(
            value.stored_bytes
            for expansion in self.expansions
            for value in expansion.inputs.values()
            if isinstance(value, Stored)
        )
