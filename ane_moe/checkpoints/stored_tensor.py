"""Where one tensor of a checkpoint lies, and what gives its numbers where they are codes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from ane_moe.checkpoints.weight_file import WeightFile


class Codec(Protocol):
    """What gives the numbers of a tensor that is stored in codes."""

    @property
    def columns(self) -> int:
        """Of a row."""

    @property
    def together(self) -> int:
        """Rows that are decoded together: reads begin and end at multiples of it."""

    def rows(self, first: int, last: int) -> np.ndarray:
        """Rows [first, last), fp32, `(last - first, columns)`."""

    @property
    def pieces(self) -> "Pieces | None":
        """What the numbers are made of; None where that is of a form of its own."""


@dataclass(frozen=True)
class Pieces:
    """`(code - zero) * scale`, or some other sum that scales by block, taken apart.

    `codes` and, where they are all there is to it, `scales` and `zeros` give a number for each
    element. `values` are those that codes may have. Of `height` rows and `width` columns all have
    one scale; 0 stands for all of them.
    """

    codes: Codec
    values: tuple[float, ...]
    height: int
    width: int
    scales: Codec | None = None
    zeros: Codec | None = None

    def through(self, change: Callable[[Codec], Codec]) -> "Pieces":
        """The pieces of what `change` makes of whole numbers."""
        changed = (one and change(one) for one in (self.scales, self.zeros))
        scales, zeros = changed
        return replace(self, codes=change(self.codes), scales=scales, zeros=zeros)


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor's bytes lie: `offset` is counted from the start of the file. `key` is its
    name there; of a tensor that is `made` of another one, by rows of it or times `scale`, only for
    people. With a `codec` the numbers come from that, fp32, and place and size are those of the
    codes."""

    key: str
    path: WeightFile
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int
    scale: float = 1.0
    made: bool = False
    codec: Codec | None = None
