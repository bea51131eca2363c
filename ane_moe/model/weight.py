"""What a model's own tensors are called, and what each of them is for.

A checkpoint's keys are a family's business; downstream of the families only the names of this file
exist. A part of the model lists its tensors as rows (`Weight`), each with a path inside the part;
`WeightName` says where in the model a part stands. As text:

    embed.weight                head.norm.weight                    layers.N.attn.q.weight
    head.rows.weight            layers.N.ffn.router.weight
    layers.N.ffn.experts.E.gate.weight

This is the only file in which such a name is put together or taken apart.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

Shape = tuple[int, ...]

NAME = re.compile(r"(?:layers\.(\d+)\.)?(?!layers\.)([a-z]+)\.(?:experts\.(\d+)\.)?(.+)")
# A parameter of a block: inside a stack the layer goes before it, where a block has several parts
# the part.
PARAMETER = re.compile(r"(?:layers\.(\d+)\.)?(?:(attn|ffn)\.)?(?:experts\.(\d+)\.)?(.+)")


@dataclass(frozen=True)
class Weight:
    """One tensor of a part: a matrix `(rows, columns)`, or a vector.

    `role` is what a recipe calls it (None: it stays fp16, whatever the recipe); `reads` names the
    activation that enters it, whose mean squares weigh its errors; `fold` is the multiplier of the
    model (a field of ModelSpec) that goes into it, so that no graph needs an operation for it.
    `centred`: only differences of its elements count, and the largest becomes 0, which leaves fp16
    more digits.
    """

    path: str
    shape: Shape
    role: str | None = None
    reads: str = ""
    fold: str = ""
    centred: bool = False

    def under(self, prefix: str) -> "Weight":
        """The row of a part that stands inside another one. What it reads is told apart by `prefix`
        too, unless that is the whole's own input `x`."""
        reads = self.reads if self.reads in ("", "x") else f"{prefix}.{self.reads}"
        return replace(self, path=f"{prefix}.{self.path}", reads=reads)


@dataclass(frozen=True)
class Selection:
    """One-hot rows that pick the gates of the experts a part of a split layer holds: made, not
    read."""

    path: str
    shape: tuple[int, int]

    def under(self, prefix: str) -> "Selection":
        return replace(self, path=f"{prefix}.{self.path}")


@dataclass(frozen=True)
class Directions:
    """One of the two thin matrices kept apart from the matrix at the path `of`: its `rank`
    strongest directions, on the way in or out."""

    path: str
    of: str
    rank: int
    side: Literal["in", "out"]

    def under(self, prefix: str) -> "Directions":
        return replace(self, path=f"{prefix}.{self.path}", of=f"{prefix}.{self.of}")


@dataclass(frozen=True)
class Early:
    """A later layer's router with an adapter in front of it, in one matrix: made, not read."""

    path: str
    shape: tuple[int, int]

    def under(self, prefix: str) -> "Early":
        return replace(self, path=f"{prefix}.{self.path}")


@dataclass(frozen=True)
class EarlyBias:
    """What that router adds to its scores, by expert: the checkpoint's own."""

    path: str
    shape: tuple[int]

    def under(self, prefix: str) -> "EarlyBias":
        return replace(self, path=f"{prefix}.{self.path}")


Row = Weight | Selection | Directions | Early | EarlyBias


def with_directions(rows: Iterable[Weight], ranks: Mapping[str, int]) -> Iterator[Row]:
    """The rows of a part, and after those of each projection the directions kept apart from its
    matrix, where `ranks` (by the projection's path) asks for any."""
    for stem, own in groupby(rows, lambda row: row.path.rpartition(".")[0]):
        yield from own
        if rank := ranks.get(stem, 0):
            yield Directions(f"{stem}.recover_in", f"{stem}.weight", rank, "in")
            yield Directions(f"{stem}.recover_out", f"{stem}.weight", rank, "out")


@dataclass(frozen=True, order=True)
class WeightName:
    """Where a tensor stands: the part of a layer (or of the model), one of its experts, and the
    path inside it."""

    layer: int | None
    part: str
    expert: int | None
    path: str

    def __str__(self) -> str:
        layer = "" if self.layer is None else f"layers.{self.layer}."
        expert = "" if self.expert is None else f"experts.{self.expert}."
        return f"{layer}{self.part}.{expert}{self.path}"

    @property
    def template(self) -> str:
        """The name with `{layer}` and `{expert}` for the numbers, as key tables spell it."""
        layer = "" if self.layer is None else "layers.{layer}."
        expert = "" if self.expert is None else "experts.{expert}."
        return f"{layer}{self.part}.{expert}{self.path}"

    def beside(self, path: str) -> "WeightName":
        """Another tensor, or activation, of the same expert or part."""
        return replace(self, path=path)

    def in_layer(self, layer: int | None) -> "WeightName":
        """The same tensor of another layer, or of none."""
        return replace(self, layer=layer)


EMBEDDING = WeightName(None, "embed", None, "weight")
HEAD = WeightName(None, "head", None, "rows.weight")
HEAD_BIAS = WeightName(None, "head", None, "rows.bias")


def parse_name(text: str) -> WeightName:
    """The name that `str` made `text` of. Raises ValueError when it is none."""
    parsed = NAME.fullmatch(text)
    if parsed is None:
        raise ValueError(f"{text!r} names no tensor")
    layer, part, expert, path = parsed.groups()
    return WeightName(_number(layer), part, _number(expert), path)


@dataclass(frozen=True)
class Place:
    """Where the block of a graph stands in the model: its layers (none: outside of them), the part
    that it is where its parameters do not say, and the experts it holds, in order."""

    layers: tuple[int, ...] = ()
    part: str = ""
    experts: tuple[int, ...] = ()

    def name(self, parameter: str) -> WeightName:
        """The tensor that the block's parameter `parameter` is."""
        parsed = PARAMETER.fullmatch(parameter)
        assert parsed is not None
        index, part, expert, path = parsed.groups()
        layer = self.layers[int(index or 0)] if self.layers else None
        return WeightName(
            layer, part or self.part, None if expert is None else self.experts[int(expert)], path
        )


def _number(text: str | None) -> int | None:
    return None if text is None else int(text)
