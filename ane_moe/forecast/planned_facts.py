"""What the placement rules may ask of packages that are not there yet: facts of a plan's functions.

They are those that placement/facts.py reads off a program, as far as the plan decides them: ports,
weights and their formats, products, states. All else that our graphs do is arithmetic that no rule
tells apart; of it there is the number alone.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from ane_moe.conversion.plan import ConversionPlan, ShardPlan
from ane_moe.formats.recipe import Choice
from ane_moe.formats.stored_form import stored_form
from ane_moe.manifest import ShardFunction
from ane_moe.mlprogram.program import Operation, TensorType
from ane_moe.mlprogram.weights import Part
from ane_moe.model.experts import GivenExpertConfig
from ane_moe.model.part import PartConfig
from ane_moe.model.port import MASK, SHIFT, Port
from ane_moe.model.recent import RECENT
from ane_moe.model.template_key import TemplateKey, function_name, weight_name
from ane_moe.model.weight import PARAMETER, Directions, Row, Shape, Weight
from ane_moe.placement.facts import FunctionFacts, OpFacts, feature_facts

CONVERTER = version("coremltools")
OPSET = 18  # packages are for iOS 18 and macOS 15
READS, WRITES = 3, 2  # operations of these types for each state
INWARD = ("q", "k", "v", "gate", "up", "rows")  # projections that read the input of their part
# How many operations come with a weight, by the last name of its path: the convolution, and what
# the part does that no other weight stands for. A test counts them in packages.
OPERATIONS: dict[str, float] = {
    "norm": 12,
    "q_norm": 12,
    "k_norm": 12,
    "o": 36,  # with the core of attention, rotation and residual
    "router": 15,  # with the mask of the chosen
    "down": 5,  # with activation and residual
    "experts.down": 7,  # with the gate that is cut out for it, too
    "shared_gate": 3,
    "recover_out": 2,
    "value_norm": 12,
    "rate": 55,  # with the step or chunk of a delta net
    "skip": 26,  # with the step or chunk of Mamba-2
    "state": 7.5,  # reads and writes, and the shapes they need
}
GATED_INPUT = "u"  # what a gated convolution over tokens is of: no attention comes before its `o`
OF_ATTENTION = 27
# Of these, how many elementwise ones stand on the longest way. A test counts them too.
IN_A_ROW = {
    "norm": 8,
    "q_norm": 8,
    "o": 5,
    "router": 11,
    "down": 4,
    "experts.down": 6,  # with adding the experts in pairs
    "skip": 28,  # with the way from a step to the norm
}


_Like = tuple[Shape, str]  # the shape and the stored form of a matrix


@dataclass(frozen=True)
class PlannedFunction:
    """A function of a package, and what the rules may ask of it."""

    shard: ShardPlan
    function: ShardFunction
    facts: FunctionFacts


def facts_of_plan(plan: ConversionPlan) -> Iterator[PlannedFunction]:
    """Every function that is planned; of those that no rule tells apart, the first."""
    seen = set()
    for shard in plan.shards:
        entries = {entry.entry: entry for entry in (*shard.functions, *shard.adapted)}
        for prefix, key in shard.graphs.items():
            weights = _weights(shard, prefix, key.block)
            package = shard.file_bytes, len(entries)
            if (key, weights, package) in seen:
                continue
            seen.add((key, weights, package))
            for name, tokens in key.functions:
                entry = entries[function_name(prefix, name)]
                own = _weights(shard, prefix, key.block_of(name))
                graph = _Graph(shard, key, own, tokens)
                yield PlannedFunction(shard, entry, graph.facts(entry))


def elementwise_in_a_row(key: TemplateKey) -> int:
    """About as many elementwise operations as follow one another in a graph: experts, and the twin
    norms of q and k, stand side by side and count once."""
    names = {_place(row.path) for row in _rows(key)}
    return sum(IN_A_ROW.get(stem, 0) for _, _, stem in names)


@dataclass(frozen=True)
class _Weight:
    """A parameter of a graph as it will be stored. `reads_input`: its convolution reads the input
    of its part, which is one of the graph's layers (`place`)."""

    stem: str
    place: tuple[str | None, ...]
    shape: Shape
    form: str
    stored_bytes: int
    reads_input: bool


def _weights(shard: ShardPlan, prefix: str, block: PartConfig) -> tuple[_Weight, ...]:
    if isinstance(block, GivenExpertConfig):
        return tuple(map(_given, block.given.values()))
    names = {row: weight_name(prefix, row.path) for row in block.rows()}
    return tuple(_weight(shard, row, shard.shared.get(own, own)) for row, own in names.items())


def _rows(key: TemplateKey) -> Iterable[Row]:
    """The weights of a graph, and those that it is given."""
    block = key.block
    return block.given.values() if isinstance(block, GivenExpertConfig) else block.rows()


def _given(row: Weight) -> _Weight:
    """A weight that is an input: fp16, and nowhere in the package."""
    layer, part, stem = _place(row.path)
    return _Weight(stem, (layer, part), row.shape, "", 0, _reads_input(row))


def _weight(shard: ShardPlan, row: Row, name: str) -> _Weight:
    layer, part, stem = _place(row.path)
    form = stored_form(shard.choices.get(name, Choice()).format)
    shape, size = shard.sources[name].shape, shard.payloads[name]
    return _Weight(stem, (layer, part), shape, form, size, _reads_input(row))


def _reads_input(row: Row) -> bool:
    """Whether the convolution with this weight reads the input of its part."""
    if isinstance(row, Weight):
        return row.reads in ("", "x")
    return isinstance(row, Directions) and row.side == "in" and row.path.split(".")[-2] in INWARD


def _place(path: str) -> tuple[str | None, str | None, str]:
    """The layer and the part of a parameter, and the last name of its path."""
    parsed = PARAMETER.fullmatch(path)
    assert parsed is not None
    layer, part, expert, rest = parsed.groups()
    *_, owner, leaf = rest.split(".")
    stem = owner if leaf == "weight" else leaf
    return layer, part, f"experts.{stem}" if expert and f"experts.{stem}" in OPERATIONS else stem


@dataclass(frozen=True)
class _Graph:
    """One function of a template, before it is made."""

    shard: ShardPlan
    key: TemplateKey
    weights: tuple[_Weight, ...]
    tokens: int

    def facts(self, entry: ShardFunction) -> FunctionFacts:
        ports, states = entry.ports, len(entry.ports.states)
        ops = [*self._convolutions(), *self._products(entry), *self._shifts(entry)]
        ops += self._states(states)
        total = self._count(states)
        stream = max((math.prod(port.shape) for port in ports.inputs if port.by_channel), default=1)
        rest = max(0, total - sum(op.count for op in ops))
        ops.append(_op("mul", rest, _arithmetic() | _moved(stream, stream)))
        vectors = sum(weight.stored_bytes for weight in self.weights if len(weight.shape) < 2)
        ops[-1].parts = _parts(ops[-1].name, vectors)
        facts = _shared() | {
            "weight_bytes": entry.weight_bytes,
            "weight_file_bytes": self.shard.file_bytes,
            "flops": sum(op.flops for op in ops),
            "ops": total,
            "states": states,
            "package_functions": len(self.shard.functions) + len(self.shard.adapted),
            "parallel_projections": self._parallel_projections(),
            "convolutions": sum(op.count for op in ops if op.operation.type == "conv"),
            "elementwise_in_a_row": elementwise_in_a_row(self.key),
            **_refused(weight.form for weight in self.weights),
        }
        for op in ops:
            op.facts["function_ops"] = total
        groups = (("input", ports.inputs), ("output", ports.outputs), ("state", ports.states))
        features = [_feature(role, port) for role, group in groups for port in group]
        return FunctionFacts(entry.name, facts, features, ops)

    def _count(self, states: int) -> int:
        own = sum(OPERATIONS.get(weight.stem, 1) for weight in self.weights)
        own -= OF_ATTENTION * sum(weight.stem == GATED_INPUT for weight in self.weights)
        return round(own + states * OPERATIONS["state"])

    def _convolutions(self) -> Iterator[OpFacts]:
        """Those of one shape and format at once."""
        counts, sizes = Counter[_Like](), Counter[_Like]()
        for weight in self.weights:
            if len(weight.shape) > 1:
                counts[weight.shape, weight.form] += 1
                sizes[weight.shape, weight.form] += weight.stored_bytes
        for like, count in counts.items():
            shape, form = like
            op = _op("conv", count, self._convolution(shape, form), f"{_sizes(shape)} {form}")
            op.parts = _parts(op.name, sizes[like])
            yield op

    def _convolution(self, shape: Shape, form: str) -> dict[str, Any]:
        """By a matrix, or over the `taps` tokens of a window in groups of channels. One of no form
        is an input."""
        rows, columns, taps = (*shape, 1)[:3]
        groups = rows // columns if len(shape) > 2 else 1
        channels, window = columns * groups, self.tokens + taps - 1
        given = {} if form else {"constants": frozenset[str]()}
        return (
            _product()
            | given
            | {"n": 1, "c": max(rows, channels), "h": 1, "w": window}
            | _moved(channels * window, rows * self.tokens, math.prod(shape))
            | {
                "channels_in": channels,
                "channels_out": rows,
                "groups": groups,
                "kernel_w": taps,
                "elements": channels * window,
                "reduction": columns * taps,
                "weight_format": form,
                "flops": 2 * rows * columns * taps * self.tokens,
            }
        )

    def _shifts(self, entry: ShardFunction) -> Iterator[OpFacts]:
        """What picks the last tokens of a window: each state of a convolution over tokens is one
        side of a product."""
        shifts = [port for port in entry.ports.inputs if port.root == SHIFT]
        for state, port in zip(self._recent, itertools.cycle(shifts), strict=False):
            _, channels, _, width = state
            depth = port.shape[2]
            facts = _product() | {"reduction": depth, "w": width}
            facts |= {"flops": 2 * channels * depth * width}
            facts |= _moved(channels * depth, channels * width)
            yield _op("matmul", 1, facts, "shift")

    def _products(self, entry: ShardFunction) -> Iterator[OpFacts]:
        """Of attention: each cache of its own is written by a product, and its slots are read by
        another, over all heads (as wide together as what `o` reads). Without a cache, the tokens of
        the call are the slots."""
        slots = max((shape[-1] for shape in self._caches), default=0)
        widths = [weight.shape[1] for weight in self.weights if weight.stem == "o"]
        if widths and not slots and any(port.root == MASK for port in entry.ports.inputs):
            width = sum(widths) // len(widths)
            flops = 2 * self.tokens * self.tokens * width
            facts = _product() | {"reduction": self.tokens, "w": self.tokens, "flops": flops}
            facts |= _moved(2 * width * self.tokens, width * self.tokens)
            yield _op("matmul", 2 * len(widths), facts, "attention")
        if not (slots and widths):
            return
        written = sum(map(math.prod, self._kept))
        depth = max(max(shape[-2:]) for shape in self._caches)
        flops, count = 2 * self.tokens * (2 * sum(widths) * slots + written), self._products_count
        facts = _product() | {"reduction": depth, "w": slots, "flops": flops / count}
        read = sum(map(math.prod, self._caches))
        facts |= _moved((written + read) // count, sum(widths) * self.tokens // count)
        yield _op("matmul", count, facts, "attention")

    @property
    def _caches(self) -> list[tuple[int, ...]]:
        """The shapes of those that are read."""
        return [*self._kept, *self.shard.borrowed.values()]

    @property
    def _kept(self) -> list[tuple[int, ...]]:
        """The shapes of those of its own."""
        states = self.shard.states.items()
        return [shape for slot, shape in states if not slot.endswith(RECENT)]

    @property
    def _recent(self) -> list[tuple[int, ...]]:
        """The shapes of states that hold the last tokens of a convolution."""
        states = self.shard.states.items()
        return [shape for slot, shape in states if slot.endswith(RECENT)]

    @property
    def _products_count(self) -> int:
        return len(self._kept) + len(self._caches)

    def _states(self, states: int) -> list[OpFacts]:
        """Their operations, and those that mask what is kept and add what is new."""
        sizes = [math.prod(shape) for shape in self.shard.states.values()]
        one = sum(sizes) // max(1, len(sizes))
        kept, added = _moved(one, one), _moved(2 * one, one)
        written = {"mul": kept, "add": added} if sizes else {}
        masks = [_op(kind, len(sizes), _arithmetic() | moved) for kind, moved in written.items()]
        return [*_state_ops(states, one), *masks]

    def _parallel_projections(self) -> int:
        readers = Counter(
            weight.place for weight in self.weights if weight.reads_input and len(weight.shape) == 2
        )
        return max(readers.values(), default=0)


def _sizes(shape: Shape) -> str:
    return " x ".join(map(str, shape))


def _parts(name: str, size: int) -> tuple[Part, ...]:
    """The stored pieces of what an operation reads, as one: planned, so they lie nowhere yet."""
    return (((name, 0), size),) if size else ()


def _refused(forms: Iterable[str]) -> dict[str, int]:
    """How many weights are in forms that take a whole function off the engine."""
    listed = list(forms)
    return {
        "per_block_weights": sum(" block " in form for form in listed),
        "vector_palettes": sum("vectors of" in form for form in listed),
    }


def _shared() -> dict[str, Any]:
    """Facts of all our functions and of their operations."""
    return {"converter": CONVERTER, "opset": OPSET, "enumerated": False, "widest_range": 1}


def _arithmetic() -> dict[str, Any]:
    return _shared() | {
        "nested": False,
        "rank": 4,
        "input_rank": 4,
        "dtypes": frozenset({"fp16"}),
        "fan_in": 1,
        "infinite_constant": False,
        "weight_format": "",
        "feeds": frozenset(),
        "constants": frozenset(),
    }


def _product() -> dict[str, Any]:
    return _arithmetic() | {
        "constants": frozenset({"weight"}),
        "groups": 1,
        "kernel_h": 1,
        "kernel_w": 1,
    }


def _moved(elements_in: int, elements_out: int, weights: int = 0) -> dict[str, int]:
    """Elements and fp16 bytes of what an operation reads and gives."""
    return {
        "elements_first": elements_in,
        "elements_in": elements_in + weights,
        "elements_out": elements_out,
        "bytes_in": 2 * (elements_in + weights),
        "bytes_out": 2 * elements_out,
        "bytes_literal": 0,
        "elements_literal": 0,
        "dilation": 1,
    }


def _state_ops(states: int, elements: int = 1) -> list[OpFacts]:
    if not states:
        return []
    moved = {  # what is written is read beside what it takes the place of
        "read_state": (READS, _moved(elements, elements)),
        "write_state": (WRITES, _moved(2 * elements, 0)),
    }
    return [
        _op(kind, each * states, _arithmetic() | sizes) for kind, (each, sizes) in moved.items()
    ]


def _op(kind: str, count: int, facts: dict[str, Any], name: str = "") -> OpFacts:
    operation, depth = Operation(kind, name or kind, {}, ()), facts.get("reduction", 0)
    flops = round(facts.get("flops", 0) * count)
    return OpFacts(operation, facts | {"op": kind}, flops, depth, (), (), count)


def _feature(role: str, port: Port) -> dict[str, Any]:
    return feature_facts(role, port.name, TensorType("fp16", port.shape))
