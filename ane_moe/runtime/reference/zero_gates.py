"""Leaving out what is multiplied by gates that are all zero: the experts that no token of a call
chose.

An expert is a chain of steps from one input `x` to a `hidden` that nothing else reads, a product
with a gate, and a convolution without bias. Where the gate is exactly zero and `hidden` is finite
the convolution gives zeros, whatever the chain computes. That it is finite is not assumed: by
Cauchy's inequality a product with a row of weights is at most the norm of the row times the norm of
the column, so a bound on the norm of `x` bounds each number of the chain. Above that bound, and
until the norms of the rows are known (from the first call), everything is computed. The bound
holds of partial sums in any order, too.

Where the columns of a product are computed apart from each other, so are those of an expert: the
columns of `x` whose gates are zero are made zeros, which take no time. A call is then so dear that
the norms are found before it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ane_moe.runtime.reference.steps import Slots, Step, Steps, Target

LARGEST = 32736.0  # fp16 and the engine's sums hold more
ROUNDING = 1.001  # how much larger a rounded result can be, of fp16 and of sums in fp32
# Powers of two between which the largest safe norm of an input is looked for, and the halvings.
LOWEST, HIGHEST, HALVINGS = -10.0, 24.0, 10

# The largest magnitude of an element-wise result, by those of what enters it.
MAGNITUDES: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "gelu": lambda x: x,
    "identity": lambda x: x,
    "mul": torch.mul,
    "relu": lambda x: x,
    "sigmoid": torch.ones_like,
    "silu": lambda x: x,
    "tanh": torch.ones_like,
    "widen": lambda x: x,
}


@dataclass
class Gated:
    """The steps of one expert: `chain` from slot `x` to what `gate` multiplies, and the `rest`,
    whose last one is the convolution that gives `result`. `norm` is the slot of the norm of `x`."""

    chain: tuple[Step, ...]
    rest: tuple[Step, ...]
    x: int
    gate: int
    result: Target
    shape: tuple[int, ...]
    norm: int = 0
    inner: Steps = field(default_factory=lambda: Steps(""))
    limit: float = -1.0  # norm of x up to which everything in the chain is finite
    known: bool = False  # the limit is
    apart: bool = False  # columns are computed one by one

    @property
    def last(self) -> Step:
        """The step in whose place all of them are run."""
        return self.rest[-1]

    def step(self, where: str) -> Step:
        """All of it as one step."""
        steps = [replace(step, frees=()) for step in (*self.chain, *self.rest)]
        self.inner = Steps(where, steps)
        self.inner.free_dead(frozenset({self.result.slot}))
        written = {slot for step in steps for slot in step.writes}
        reads = {slot for step in steps for slot in step.reads} - written
        writes = frozenset({self.result.slot})
        return Step(self.last.op, self.last.name, self.run, frozenset({*reads, self.norm}), writes)

    def run(self, slots: Slots) -> None:
        """The convolution's result, by computing it or without."""
        if not self.known:
            self.prepare(slots)
        if not slots[self.norm] <= self.limit:
            self.inner.execute(slots)
        elif not slots[self.gate].any():
            slots[self.result.slot] = torch.zeros(self.shape, dtype=self.result.dtype)
        elif self.apart:
            self._run_apart(slots)
        else:
            self.inner.execute(slots)

    def _run_apart(self, slots: Slots) -> None:
        """With only those columns of `x` that have a gate."""
        x, chosen = slots[self.x], slots[self.gate].bool().any(1, keepdim=True)
        if chosen.shape[2:] == x.shape[2:]:
            slots[self.x] = torch.where(chosen, x, 0)
        self.inner.execute(slots)
        slots[self.x] = x

    def prepare(self, slots: Slots) -> None:
        """Find the limit, once the norms of all rows are known; until then ask for them."""
        convolutions = [step for step in (*self.chain, self.last) if _is_conv(step)]
        matrices = [slots[_inputs(step)[1]] for step in convolutions]
        unknown = [matrix for matrix in matrices if matrix.row_norms is None]
        for matrix in unknown:
            matrix.measure_now() if self.apart else matrix.measure()
        if unknown and not self.apart:
            return
        self.known = True
        if not bool(matrices[-1].row_norms.isfinite().all()):
            return
        low, high = LOWEST, HIGHEST
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self._is_finite(2**middle, slots) else (low, middle)
        self.limit = 2**low if self._is_finite(2**low, slots) else -1.0

    def _is_finite(self, norm: float, slots: Slots) -> bool:
        """Whether a norm of `x` of at most `norm` keeps each number of the chain within fp16."""
        sizes: dict[int, Tensor] = {}
        for step in self.chain:
            if _is_conv(step):
                x, matrix = _inputs(step)
                entering = norm if x == self.x else torch.linalg.vector_norm(sizes[x])
                size = slots[matrix].row_norms * entering
            else:
                size = MAGNITUDES[step.op](*(sizes[slot] for slot in _inputs(step)))
            size = size * ROUNDING
            if not bool((size < LARGEST).all()):
                return False
            sizes[_only(step.writes)] = size
        return True


def lean(
    steps: Steps,
    results: frozenset[int],
    matrices: frozenset[int],
    new_slot: Callable[[], int],
    apart: bool,
) -> Steps:
    """`steps` with each expert as one step, for calls in which nobody looks at what lies between.
    `matrices` are the slots of constant matrices, `results` those that must be filled; `apart`:
    columns of a product are computed apart from each other."""
    experts = _Finder(steps.steps, results, matrices).experts()
    norms: dict[int, int] = {}
    at = {id(expert.last): expert for expert in experts}
    inside = {id(step) for expert in experts for step in (*expert.chain, *expert.rest)}
    found = Steps(steps.where)
    for step in steps.steps:
        expert = at.get(id(step))
        if expert is not None:
            if expert.x not in norms:
                norms[expert.x] = new_slot()
                found.steps.append(_norm_of(expert.x, norms[expert.x]))
            expert.norm, expert.apart = norms[expert.x], apart
            found.steps.append(expert.step(steps.where))
        elif id(step) not in inside:
            found.steps.append(replace(step, frees=()))
    found.free_dead(results)
    return found


def _norm_of(x: int, slot: int) -> Step:
    """The largest norm of a column of `x`."""

    def run(slots: Slots) -> None:
        slots[slot] = torch.linalg.vector_norm(slots[x], dim=1, dtype=torch.float32).max().item()

    return Step("norm", "", run, frozenset({x}), frozenset({slot}))


@dataclass
class _Finder:
    steps: Sequence[Step]
    results: frozenset[int]
    matrices: frozenset[int]

    def __post_init__(self) -> None:
        self.writer: Mapping[int, Step] = {
            slot: step for step in self.steps for slot in step.writes
        }
        self.readers: dict[int, list[Step]] = {}
        for step in self.steps:
            for slot in step.reads:
                self.readers.setdefault(slot, []).append(step)

    def experts(self) -> list[Gated]:
        """Those that can be left out; no step is in two of them."""
        found: list[Gated] = []
        for step in self.steps:
            if step.op == "mul" and len(step.sources) == 2:
                hidden, gate = step.sources
                expert = self._expert(step, hidden, gate) or self._expert(step, gate, hidden)
                found += [expert] if expert else []
        return found

    def _expert(self, product: Step, hidden: object, gate: object) -> Gated | None:
        assert isinstance(hidden, int) and isinstance(gate, int)
        rest = self._to_convolution(product)
        members: dict[int, Step] = {}
        inputs: set[int] = set()
        if rest is None or not self._gather(hidden, members, inputs) or len(inputs) != 1:
            return None
        chain = tuple(step for step in self.steps if id(step) in members)
        result = rest[-1].targets[0]
        shape = tuple(size or 0 for size in result.declared.shape)
        if not isinstance(result, Target) or 0 in shape:
            return None
        alone = {id(step) for step in (*chain, product)}
        made = {slot for step in chain for slot in step.writes}
        if gate in made or not all(self._stays(step, alone) for step in chain):
            return None
        return Gated(chain, rest, inputs.pop(), gate, result, shape)

    def _to_convolution(self, product: Step) -> tuple[Step, ...] | None:
        """The product and what follows, up to the convolution that alone reads it."""
        rest = [product]
        while not self._is_matrix(rest[-1]):
            slot = _only(rest[-1].writes)
            readers = self.readers.get(slot, [])
            if slot in self.results or len(readers) != 1:
                return None
            if not self._is_matrix(readers[0]) and readers[0].op != "widen":
                return None
            rest.append(readers[0])
        return tuple(rest)

    def _gather(self, slot: int, members: dict[int, Step], inputs: set[int]) -> bool:
        """Collect the steps that make a slot, back to the inputs of convolutions; False where there
        is one whose size is not bounded."""
        step = self.writer.get(slot)
        if step is None or id(step) in members:
            return step is not None
        if self._is_matrix(step):
            members[id(step)] = step
            x = step.sources[0]
            assert isinstance(x, int)
            inner = len(self.readers[x]) == 1 and self._gathers(x)
            if inner:
                return self._gather(x, members, inputs)
            inputs.add(x)
            return True
        if step.op not in MAGNITUDES or not step.sources:
            return False
        members[id(step)] = step
        return all(
            isinstance(source, int) and self._gather(source, members, inputs)
            for source in step.sources
        )

    def _gathers(self, slot: int) -> bool:
        """Whether a slot that one convolution reads is itself made by others of the chain: of a
        matrix in two factors."""
        return self._gather(slot, {}, set())

    def _is_matrix(self, step: Step) -> bool:
        return _is_conv(step) and step.sources[1] in self.matrices and step.sources[2] is None

    def _stays(self, step: Step, among: set[int]) -> bool:
        """Whether nothing but `among` reads what a step makes."""
        return all(
            slot not in self.results and all(id(reader) in among for reader in self.readers[slot])
            for slot in step.writes
        )


def _is_conv(step: Step) -> bool:
    return step.op == "conv" and len(step.sources) == 3


def _inputs(step: Step) -> list[int]:
    """The slots that a step's kernel is given."""
    return [source for source in step.sources if isinstance(source, int)]


def _only(slots: frozenset[int]) -> int:
    (slot,) = slots
    return slot
