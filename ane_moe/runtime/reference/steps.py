"""The steps a prepared function is made of: closures over slots, with nothing left to look up."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ane_moe.errors import UserError
from ane_moe.mlprogram.program import ListType, TensorType, ValueType, sizes
from ane_moe.mlprogram.values import describe
from ane_moe.runtime.reference.dtypes import torch_dtype
from ane_moe.runtime.reference.lists import TensorList
from ane_moe.runtime.reference.op_error import OpError
from ane_moe.runtime.reference.ops.table import Kernel

Slots = list[Any]
Run = Callable[[Slots], None]
# One kernel argument: a slot, an absent input, or a list of slots.
Source = int | None | tuple[int, ...]


@dataclass(slots=True)
class Step:
    """One op. `shown` are the slots of its outputs with their names, in order; `frees` die after
    it. `sources` and `targets` are what its kernel takes and gives, in order, where it has one."""

    op: str
    name: str
    run: Run
    reads: frozenset[int]
    writes: frozenset[int]
    shown: tuple[tuple[str, int], ...] = ()
    frees: tuple[int, ...] = ()
    sources: tuple[Source, ...] = ()
    targets: tuple["AnyTarget", ...] = ()


@dataclass(frozen=True)
class Target:
    """Where a result goes and what it must be."""

    slot: int
    dtype: torch.dtype
    declared: TensorType
    rounds: bool  # an fp32 result is rounded to the declared dtype

    def fit(self, y: Any) -> Tensor:
        """`y` in the declared dtype; raises UserError where it is not what the program declares."""
        if not isinstance(y, Tensor):
            raise UserError("result is no tensor", type(y).__name__)
        if y.dtype is not self.dtype:
            if not (self.rounds and y.dtype is torch.float32):
                raise UserError(
                    "result has another type than declared", f"{y.dtype} for {self.dtype}"
                )
            y = y.to(self.dtype)
        if not self.declared.admits(y.shape):
            raise UserError(
                "result has another shape than declared",
                f"{sizes(y.shape)} for {sizes(self.declared.shape)}",
            )
        return y


@dataclass(frozen=True)
class ListTarget:
    """Where a list goes and what its elements must be."""

    slot: int
    declared: TensorType

    def fit(self, y: Any) -> TensorList:
        """`y`; raises UserError where it is not what the program declares."""
        if not isinstance(y, TensorList):
            raise UserError("result is no list", type(y).__name__)
        if y.dtype is not torch_dtype(self.declared.dtype):
            raise UserError(
                "result is a list of another type than declared",
                f"{y.dtype} for {self.declared.dtype}",
            )
        if y.shape is not None and not self.declared.admits(y.shape):
            raise UserError(
                "result is a list of another shape than declared",
                f"{sizes(y.shape)} for {sizes(self.declared.shape)}",
            )
        return y


AnyTarget = Target | ListTarget


def target(slot: int, declared: ValueType, rounds: bool) -> AnyTarget:
    """Raises UserError for a type that no op's result has."""
    if isinstance(declared, ListType) and isinstance(declared.element, TensorType):
        return ListTarget(slot, declared.element)
    if not isinstance(declared, TensorType):
        raise UserError("a result is neither a tensor nor a list of tensors", describe(declared))
    narrow = declared.dtype in ("fp16", "bf16")
    return Target(slot, torch_dtype(declared.dtype), declared, rounds and narrow)


def bind(kernel: Kernel, sources: Sequence[Source], targets: Sequence[AnyTarget]) -> Run:
    """The closure that runs `kernel` on slots and stores what it returns."""
    match targets:
        case [Target() as only]:
            return _bind_one(kernel, sources, only)
    return _bind_many(kernel, sources, targets)


def _bind_one(kernel: Kernel, sources: Sequence[Source], into: Target) -> Run:
    """One result. Written out for the commonest arities: this is the inner loop."""
    slot, finish = into.slot, _finisher(into)
    match sources:
        case [int() as a]:

            def run(slots: Slots) -> None:
                slots[slot] = finish(kernel(slots[a]))

        case [int() as a, int() as b]:

            def run(slots: Slots) -> None:
                slots[slot] = finish(kernel(slots[a], slots[b]))

        case _:
            compute = _getter(kernel, sources)

            def run(slots: Slots) -> None:
                slots[slot] = finish(compute(slots))

    return run


def _finisher(into: Target) -> Callable[[Any], Tensor]:
    """What makes a result what is declared; the usual one is neither looked at twice nor given to
    `fit`."""
    dtype, shape, fit = into.dtype, into.declared.shape, into.fit
    wide = torch.float32 if into.rounds else dtype

    def finish(y: Any) -> Tensor:
        if type(y) is tuple:  # an op that splits, here into one
            y = _only(y)
        if y.shape == shape:
            if y.dtype is dtype:
                return y
            if y.dtype is wide:
                return y.to(dtype)
        return fit(y)

    return finish


def _getter(kernel: Kernel, sources: Sequence[Source]) -> Callable[[Slots], Any]:
    """`kernel` called on slots."""
    match sources:
        case [int() as a, int() as b, None]:
            return lambda slots: kernel(slots[a], slots[b], None)
        case [int() as a, int() as b, int() as c]:
            return lambda slots: kernel(slots[a], slots[b], slots[c])
        case [tuple() as listed]:
            return lambda slots: kernel([slots[i] for i in listed])
    return lambda slots: kernel(*[_pick(slots, source) for source in sources])


def _pick(slots: Slots, source: Source) -> Any:
    if isinstance(source, int):
        return slots[source]
    return None if source is None else [slots[i] for i in source]


def _only(results: tuple) -> Any:
    if len(results) != 1:
        raise UserError("op has another number of results than declared", f"{len(results)} for 1")
    return results[0]


def _bind_many(kernel: Kernel, sources: Sequence[Source], targets: Sequence[AnyTarget]) -> Run:
    compute = _getter(kernel, sources)

    def run(slots: Slots) -> None:
        results = compute(slots)
        results = results if isinstance(results, tuple) else (results,)
        if len(results) != len(targets):
            raise UserError(
                "op has another number of results than declared",
                f"{len(results)} for {len(targets)}",
            )
        for into, y in zip(targets, results, strict=True):
            slots[into.slot] = into.fit(y)

    return run


def bind_dynamic(
    make: Callable[..., Kernel],
    fixed: dict[str, Any],
    dynamic: dict[str, int],
    sources: Sequence[Source],
    targets: Sequence[AnyTarget],
) -> Run:
    """As `bind`, for an op some of whose parameters are computed by the program itself."""

    def run(slots: Slots) -> None:
        kernel = make(**fixed, **{name: slots[slot].tolist() for name, slot in dynamic.items()})
        bind(kernel, sources, targets)(slots)

    return run


@dataclass
class Steps:
    """Steps in order, of a function, of a nested block, or of the set-up of constants."""

    where: str
    steps: list[Step] = field(default_factory=list)

    def execute(self, slots: Slots, seen: Callable[[Step], None] | None = None) -> None:
        """Run every step, dropping values after their last use; `seen` is called before they are
        dropped.

        Raises UserError naming the op that failed.
        """
        step = None
        try:
            for step in self.steps:
                step.run(slots)
                if seen is not None and step.shown:
                    seen(step)
                if step.frees:
                    for dead in step.frees:
                        slots[dead] = None
        except UserError as error:
            raise self.blame(step, error) from None
        except Exception as error:  # whatever an untrusted program can make a kernel raise
            raise self.blame(
                step, UserError("it cannot be computed", str(error).split("\n")[0])
            ) from error

    def blame(self, step: Step | None, error: UserError) -> UserError:
        """`error` with the op and the function in front, unless it says so already."""
        if step is None or isinstance(error, OpError):
            return error
        return OpError(step.op, step.name, self.where, error)

    def free_dead(self, keep: frozenset[int]) -> None:
        """Note at each step which slots nothing later reads; slots in `keep` and slots of outer
        blocks stay."""
        local = frozenset(slot for step in self.steps for slot in step.writes)
        seen = set(keep)
        for step in reversed(self.steps):
            touched = (step.reads | step.writes) & local
            step.frees = tuple(sorted(touched - seen))
            seen |= touched
