"""What makes a block distinct: its configuration, as data."""

from collections.abc import Iterator
from typing import Protocol

from ane_moe.model.port import Ports
from ane_moe.model.weight import Row


class PartConfig(Protocol):
    """What makes a block distinct; hashable, since equal ones share a graph."""

    def __hash__(self) -> int: ...

    def rows(self) -> Iterator[Row]:
        """The block's parameters, in its own order."""

    def ports(self, tokens: int) -> Ports:
        """Inputs, outputs and states of one call with `tokens` tokens. In a slot, `{0}` stands for
        the layer (`{1}`, ... for those after it in a stack)."""
