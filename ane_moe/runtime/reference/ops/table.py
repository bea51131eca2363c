"""What an op table is made of.

An op is a *maker*: it takes the op's constant parameters once, by name, and returns the kernel that
runs on tensors. A parameter that is not constant in some program costs a call of the maker per run,
and nothing else changes.
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

Kernel = Callable[..., Any]
Maker = Callable[..., Kernel]


@dataclass(frozen=True)
class Op:
    """One op of the program format, or one of its versions.

    tensors: the inputs the kernel takes, in its order: "x", "bias?" (may be absent), "values*" (a
    list). half: what the kernel does with fp16. "widen": it is given fp32 and its fp32 result is
    rounded; "native": it is
        given fp16 and answers in fp16, because it only moves values or because torch itself
        computes this op in fp32 and rounds once.
    alike: the tensor inputs that must be of one element type.
    varies: the result is another one at each call, even of constants.
    matrix: the tensor input that the kernel takes as a StoredMatrix where it is a constant matrix,
        and whether it does so by its constant parameters; `matrix_rank` is of that input.
    since: the first iOS release of the opset in which this entry holds; of several entries the
    latest fitting wins.
    """

    name: str
    make: Maker
    tensors: str = "x"
    half: Literal["widen", "native"] = "widen"
    since: int = 15
    note: str = ""
    alike: str = ""
    varies: bool = False
    matrix: tuple[str, Callable[..., bool]] | None = None
    matrix_rank: range = range(2, 3)
    parameters: frozenset[str] = field(init=False)
    required: frozenset[str] = field(init=False)
    defaults: dict[str, float] = field(init=False)  # of the parameters that are floats

    def __post_init__(self) -> None:
        accepted = inspect.signature(self.make).parameters.values()
        object.__setattr__(self, "parameters", frozenset(p.name for p in accepted))
        object.__setattr__(
            self, "required", frozenset(p.name for p in accepted if p.default is p.empty)
        )
        floats = {p.name: p.default for p in accepted if isinstance(p.default, float)}
        object.__setattr__(self, "defaults", floats)


class OpTable:
    """Finds an op's entry by name and opset."""

    def __init__(self, ops: Iterable[Op]):
        self._versions: dict[str, list[Op]] = {}
        for op in ops:
            self._versions.setdefault(op.name, []).append(op)
        for versions in self._versions.values():
            versions.sort(key=lambda op: op.since, reverse=True)

    def find(self, name: str, ios: int) -> Op | None:
        """The entry for `name` in the opset of iOS release `ios`, None when there is none."""
        return next((op for op in self._versions.get(name, ()) if op.since <= ios), None)

    def names(self) -> frozenset[str]:
        return frozenset(self._versions)


def plain(kernel: Kernel) -> Maker:
    """The maker of an op without parameters."""
    return lambda: kernel
