"""Tensors of one module that belong together: codes, and what turns them into numbers."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ane_moe.checkpoints.coded import RAW, Grid
from ane_moe.checkpoints.stored_tensor import Codec, StoredTensor
from ane_moe.errors import UserError


@dataclass(frozen=True)
class Group:
    """`base` is what their names begin with, and `ends` the tensors by the rest of their names."""

    base: str
    ends: dict[str, StoredTensor]

    def __getitem__(self, end: str) -> StoredTensor:
        return self.ends[end]

    def get(self, end: str) -> StoredTensor | None:
        return self.ends.get(end)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.base + end for end in self.ends)

    def plain(self, end: str, codec: Codec, shape: tuple[int, ...]) -> dict[str, StoredTensor]:
        """The tensor `base + end` whose numbers `codec` gives."""
        first = next(iter(self.ends.values()))
        size = sum(tensor.size for tensor in self.ends.values())
        name = self.base + end
        made = StoredTensor(
            name, first.path, "F32", shape, first.offset, size, made=True, codec=codec
        )
        return {name: made}

    def require(self, holds: bool, what: str) -> None:
        """Raises UserError where sizes do not agree."""
        if not holds:
            raise self.wrong(what)

    def wrong(self, what: str) -> UserError:
        sizes = ", ".join(f"{end}: {list(t.shape)}" for end, t in self.ends.items())
        return UserError(f"{self.base}: {what}", sizes, "download the checkpoint again")


def groups(
    tensors: Mapping[str, StoredTensor], mark: str, *others: str, needed: tuple[str, ...] = ()
) -> Iterator[Group]:
    """Those whose codes end in `mark`, with the `others` that are there; all that are `needed`
    have to be."""
    for name in tensors:
        if not name.endswith(mark):
            continue
        base = name.removesuffix(mark)
        ends = {
            end: tensors[base + end]
            for end in (mark, *needed, *others)
            if base + end in tensors and tensors[base + end].dtype in RAW
        }
        if {mark, *needed} <= ends.keys():
            yield Group(base, ends)


def grid(group: Group, end: str, shape: tuple[int, ...], order: StoredTensor | None = None) -> Grid:
    """The grid of numbers `end` over the last two axes of `shape`: one for all, for each row, or
    for each block, as its shape says. Stacks have as many grids."""
    tensor = group[end]
    rows, columns = shape[-2:]
    if math.prod(tensor.shape) == 1:
        return Grid(tensor, 1, math.prod(shape[:-1]), columns)
    high, across = (*tensor.shape, 1)[:2] if len(tensor.shape) < 2 else tensor.shape[-2:]
    height, width = -(-rows // high), -(-columns // across)
    agree = -(-rows // height) == high and -(-columns // width) == across
    stacked = math.prod(tensor.shape) == math.prod(shape[:-2]) * high * across
    group.require(agree and stacked, f"{end.lstrip('._')} does not fit the weights")
    # Blocks of a stack must not reach into the next matrix.
    group.require(len(shape) == 2 or rows % height == 0, "blocks reach over the end of an expert")
    return Grid(tensor, across, height, width, order)
