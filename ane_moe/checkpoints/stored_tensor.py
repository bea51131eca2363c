"""Where one tensor of a checkpoint lies, and what gives its numbers where they are codes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np


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


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor's bytes lie: `offset` is counted from the start of the file. `key` is its
    name there; of a tensor that is `made` of another one, by rows of it or times `scale`, only for
    people. With a `codec` the numbers come from that, fp32, and place and size are those of the
    codes."""

    key: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int
    scale: float = 1.0
    made: bool = False
    codec: Codec | None = None
