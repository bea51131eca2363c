"""An ML Program as plain data: what the reader returns and the executor, printer and placement
rules walk.

Independent of protobuf and of the converter: names are resolved by string, constants are kept as
stored until used.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class TensorType:
    """dtype: fp16 fp32 fp64 bf16 fp8e4m3fn fp8e5m2 int4..int64 uint1..uint64 bool string; a size of
    None is unknown."""

    dtype: str
    shape: tuple[int | None, ...]

    def admits(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of `shape` can be what is declared: known sizes agree, in order.

        An unknown size may also be absent. coremltools keeps an axis of unknown size where
        `squeeze` removes one, and so declares a rank that the value does not have; Core ML
        executes it.
        """
        return self.shape == tuple(shape) or len(shape) in _ends(self.shape, shape, 1)


@dataclass(frozen=True)
class VariadicType(TensorType):
    """A tensor of unknown rank: each unknown size stands for any number of dimensions."""

    def admits(self, shape: Sequence[int]) -> bool:
        return len(shape) in _ends(self.shape, shape, len(shape))


@dataclass(frozen=True)
class StateType:
    tensor: TensorType


@dataclass(frozen=True)
class ListType:
    """Tensors of one type; a length of None is unknown."""

    element: "ValueType"
    length: int | None


@dataclass(frozen=True)
class DictionaryType:
    key: "ValueType"
    value: "ValueType"


@dataclass(frozen=True)
class OtherType:
    """Tuples and what may come: kept so that they can be named in an error."""

    kind: str


ValueType = TensorType | StateType | ListType | DictionaryType | OtherType


def sizes(shape: Sequence[int | None]) -> str:
    """A shape as text, e.g. `[1, 64, ?]`."""
    return f"[{', '.join('?' if size is None else str(size) for size in shape)}]"


def _ends(declared: Sequence[int | None], shape: Sequence[int], longest: int) -> set[int]:
    """How many dimensions of `shape` can be accounted for; an unknown size takes up to
    `longest`."""
    ends = {0}
    for size in declared:
        if size is None:
            last = len(shape)
            ends = {end for start in ends for end in range(start, min(start + longest, last) + 1)}
        else:
            ends = {start + 1 for start in ends if start < len(shape) and shape[start] == size}
    return ends


@dataclass(frozen=True)
class Constant:
    """A literal. `load()` returns the array (scalars: rank 0), a str, or a tuple, reading the blob
    file only then.

    Arrays may be read-only views of the file. Sub-byte integers are unpacked to one element per
    int8/uint8, bf16 becomes fp32, fp8 becomes fp16. `blob` is (file, data offset, size in bytes)
    for values stored outside the protobuf, else None; `raw()` returns the bytes there, uint8.
    """

    type: ValueType
    load: Callable[[], np.ndarray | str | tuple]
    blob: tuple[Path, int, int] | None = None
    nbytes: int = 0  # as stored
    raw: Callable[[], np.ndarray] | None = None


Argument = str | Constant  # the name of a value in scope, or an inline constant


@dataclass(frozen=True)
class Output:
    name: str
    type: ValueType


@dataclass(frozen=True)
class Block:
    inputs: tuple[Output, ...]
    operations: tuple["Operation", ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Operation:
    """`inputs` maps an input name to its arguments (more than one for variadic inputs such as
    concat's `values`)."""

    type: str
    name: str
    inputs: dict[str, tuple[Argument, ...]]
    outputs: tuple[Output, ...]
    blocks: tuple[Block, ...] = ()
    # `val` of a const; everything of an iOS 16 constexpr_*.
    attributes: dict[str, Constant] = field(default_factory=dict)


@dataclass(frozen=True)
class Function:
    """`inputs` are tensors and states, in declared order; `opset` is e.g. "CoreML8" (iOS 18)."""

    name: str
    opset: str
    inputs: tuple[Output, ...]
    block: Block


@dataclass(frozen=True)
class Feature:
    """One input, output or state of a function as the model description declares it."""

    name: str
    type: TensorType
    optional: bool = False
    shapes: tuple[tuple[int, ...], ...] = ()  # enumerated shapes, first is the default
    # (lower, upper) per axis; upper -1: unbounded.
    ranges: tuple[tuple[int, int], ...] | None = None
    kind: str = "array"  # array, state, image, dictionary, string ...
    layout: str = ""  # of an image: RGB, BGR, grayscale or grayscale fp16
    default: int | float | None = None  # of each element, where an optional input is not given


@dataclass(frozen=True)
class Interface:
    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]
    states: tuple[Feature, ...] = ()


@dataclass(frozen=True)
class Program:
    path: Path
    functions: dict[str, Function]
    interfaces: dict[str, Interface]
    default_function: str
    specification_version: int
    metadata: dict[str, str]  # author, license, user-defined keys (com.github.apple.coremltools...)
    absent: tuple[str, ...] = ()  # what is wrong with each weight file that is not there
