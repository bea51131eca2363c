"""What the rules may ask of a program: facts of its functions, features, operations and stretches
of operations.

Read from the program alone: no weight is loaded, only literals of at most SMALL_BYTES. A fact that
is not known is None (or absent), and comparisons with it are false. Parameters given as literals
are facts too, as `arg_<name>`.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ane_moe.mlprogram.program import (
    Argument,
    Block,
    Constant,
    Feature,
    Function,
    Operation,
    Program,
    StateType,
    TensorType,
    ValueType,
)
from ane_moe.mlprogram.weights import Part, Weight, unique_bytes, weights_of

SMALL_BYTES = 4096
UNBOUNDED = 1 << 31
OPSETS = {"CoreML5": 15, "CoreML6": 16, "CoreML7": 17, "CoreML8": 18, "CoreML9": 26}
# Which axes of the engine's N, D, C, H, W a tensor lies on, by rank. A vector lies on W:
# "[1,240000]" was rejected as N1D1C1H1W240000 (mobius, mel_encoder_ane_behavior.md). Where rank 3
# lies is not known: its axes get the widest limit.
AXES = {1: "w", 2: "cw", 3: "ccc", 4: "nchw", 5: "ndchw"}
ELEMENT_BYTES = {"bool": 1, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "fp16": 2}
WIDE_BYTES = 4  # of other types: int32, fp32
# Arithmetic on each element by itself: a compiler for two engines takes long for many in a row.
ELEMENTWISE = """
abs add ceil clip cos elu erf exp exp2 floor floor_div gelu inverse leaky_relu log maximum minimum
mul pow real_div relu relu6 round rsqrt sigmoid sign silu sin softplus softsign sqrt square sub tanh
"""
RANDOM = "random_"  # operations of these types take nothing that is computed, and are no constants
CONVERTER = "com.github.apple.coremltools.version"

FUNCTION_FACTS = frozenset(
    {
        "weight_bytes",
        "weight_file_bytes",
        "flops",
        "ops",
        "states",
        "package_functions",
        "enumerated",
        "widest_range",
        "parallel_projections",
        "convolutions",
        "elementwise_in_a_row",
        "per_block_weights",
        "vector_palettes",
        "converter",
        "opset",
    }
)
FEATURE_FACTS = frozenset({"role", "name", "dtype", "rank", "last_axis", "n", "d", "c", "h", "w"})
OP_FACTS = frozenset(
    {
        "op",
        "nested",
        "rank",
        "input_rank",
        "dtypes",
        "elements",
        "n",
        "d",
        "c",
        "h",
        "w",
        "constants",
        "infinite_constant",
        "weight_format",
        "reduction",
        "channels_in",
        "channels_out",
        "kernel_h",
        "kernel_w",
        "groups",
        "axis_size",
        "fan_in",
        "feeds",
        "opset",
        "converter",
        "function_ops",
        "enumerated",
        "flops",
        "dilation",
        "window",
        "elements_first",
        "elements_in",
        "elements_out",
        "elements_literal",
        "bytes_first",
        "bytes_in",
        "bytes_out",
        "bytes_literal",
    }
)
SEGMENT_FACTS = frozenset({"surely", "possibly", "equal", "covered"})
FACTS = {
    "function": FUNCTION_FACTS,
    "feature": FEATURE_FACTS,
    "op": OP_FACTS,
    "segment": SEGMENT_FACTS,
}


@dataclass
class OpFacts:
    """One real operation: its facts, what it costs, and which operations (by index) it takes its
    inputs from.

    It may stand for `count` operations of the same facts; then its flops and parts are those of
    all.
    """

    operation: Operation
    facts: dict[str, Any]
    flops: int
    reduction: int
    parts: tuple[Part, ...]
    sources: tuple[int, ...]
    count: int = 1

    @property
    def name(self) -> str:
        """That of its first output, which compute plans use too."""
        return self.operation.outputs[0].name if self.operation.outputs else self.operation.name


@dataclass
class FunctionFacts:
    """A function's own facts, those of its inputs, outputs and states, and of every real operation
    in order."""

    name: str
    facts: dict[str, Any]
    features: list[dict[str, Any]]
    ops: list[OpFacts] = field(default_factory=list)


def is_real(kind: str) -> bool:
    """Whether operations of this type run at all: constants, compressed or not, have no device."""
    return kind != "const" and not kind.startswith("constexpr_")


def function_facts(program: Program, name: str) -> FunctionFacts:
    """Everything the rules may ask of one function. Raises UserError for literals that do not
    load."""
    function, interface = program.functions[name], program.interfaces[name]
    weights = weights_of(function)
    ops = _Walk(function, weights).ops
    roles = (
        ("input", interface.inputs),
        ("output", interface.outputs),
        ("state", interface.states),
    )
    ranges = [_span(feature) for feature in interface.inputs]
    shared = {
        "converter": program.metadata.get(CONVERTER, ""),
        "opset": OPSETS[function.opset],
        "enumerated": any(len(feature.shapes) > 1 for feature in interface.inputs),
    }
    facts = shared | {
        "weight_bytes": unique_bytes(weights),
        "weight_file_bytes": _file_bytes(weights),
        "flops": sum(op.flops for op in ops),
        "ops": len(ops),
        "states": len(interface.states),
        "package_functions": len(program.functions),
        "widest_range": max(ranges, default=1),
        "parallel_projections": _parallel_projections(ops),
        "convolutions": sum(op.operation.type == "conv" for op in ops),
        "elementwise_in_a_row": elementwise_in_a_row(ops),
        "per_block_weights": sum(" block " in weight.format for weight in weights),
        "vector_palettes": sum("vectors of" in weight.format for weight in weights),
    }
    for op in ops:
        op.facts |= shared | {"function_ops": len(ops)}
    features = [
        feature_facts(role, item.name, item.type) for role, group in roles for item in group
    ]
    return FunctionFacts(name, facts, features, ops)


def elementwise_in_a_row(ops: Sequence[OpFacts]) -> int:
    """The most elementwise operations on one way through a function, whatever lies between."""
    elementwise, steps = set(ELEMENTWISE.split()), list[int]()
    for op in ops:
        before = max((steps[source] for source in op.sources), default=0)
        steps.append(before + (op.operation.type in elementwise))
    return max(steps, default=0)


class _Walk:
    """Goes through a function's operations, nested blocks included, and collects the facts of each
    that runs: not of those that Core ML computes when it loads the model, nor of a `relu` of a
    `relu`."""

    def __init__(self, function: Function, weights: Iterable[Weight]):
        self.ops: list[OpFacts] = []
        self._weights = {weight.name: weight for weight in weights}
        self._types: dict[str, ValueType] = {item.name: item.type for item in function.inputs}
        self._constants: dict[
            str, Constant | None
        ] = {}  # None: the result of a constexpr operation
        self._makers: dict[str, int] = {}
        self._feeds: dict[int, set[str]] = {}
        self._block(function.block, nested=False)
        for index, op in enumerate(self.ops):
            op.facts["feeds"] = frozenset(self._feeds.get(index, ()))

    def _block(self, block: Block, nested: bool) -> None:
        self._types |= {item.name: item.type for item in block.inputs}
        for operation in block.operations:
            self._types |= {item.name: item.type for item in operation.outputs}
            if not is_real(operation.type):
                literal = operation.attributes.get("val") if operation.type == "const" else None
                self._constants |= dict.fromkeys((item.name for item in operation.outputs), literal)
                continue
            if self._simplified(operation):
                continue
            self._operation(operation, nested)
            for inner in operation.blocks:
                self._block(inner, nested=True)

    def _simplified(self, operation: Operation) -> bool:
        """Whether Core ML removes it; if so, what it gives is known by what it was made of."""
        running, results = self._running(operation), [item.name for item in operation.outputs]
        if not (running or operation.blocks or operation.type.startswith(RANDOM)):
            self._constants |= dict.fromkeys(results)
            return True
        maker = self._makers.get(running[0]) if operation.type == "relu" and running else None
        if maker is None or self.ops[maker].operation.type != "relu":
            return False
        self._makers |= dict.fromkeys(results, maker)
        return True

    def _running(self, operation: Operation) -> list[str]:
        """The inputs that are no constants."""
        values = [value for group in operation.inputs.values() for value in group]
        return [
            value for value in values if isinstance(value, str) and value not in self._constants
        ]

    def _operation(self, operation: Operation, nested: bool) -> None:
        index = len(self.ops)
        running = self._running(operation)
        sources = sorted({self._makers[value] for value in running if value in self._makers})
        for source in sources:
            self._feeds.setdefault(source, set()).add(operation.type)
        weights = [found for found in self._stored(operation) if found is not None]
        tensors = [
            kind
            for kind in map(_tensor, [self._types[value] for value in running])
            if kind is not None
        ]
        results = [
            kind for kind in (_tensor(item.type) for item in operation.outputs) if kind is not None
        ]
        facts = (
            _shapes([*tensors, *results])
            | self._literals(operation)
            | {
                "op": operation.type,
                "nested": nested,
                "input_rank": len(tensors[0].shape) if tensors else None,
                "dtypes": frozenset(kind.dtype for kind in [*tensors, *results]),
                "elements": max((_elements(kind) for kind in tensors), default=0),
                "fan_in": max((len(group) for group in operation.inputs.values()), default=0),
                "weight_format": "; ".join(sorted({weight.format for weight in weights})),
            }
        )
        facts |= self._traffic(operation, results) | self._product(operation, results)
        facts["dilation"] = math.prod(facts.get("arg_dilations") or (1,))
        facts["window"] = math.prod(facts.get("arg_kernel_sizes") or (1,))
        axis = facts.get("arg_axis")
        if (
            isinstance(axis, int)
            and tensors
            and -len(tensors[0].shape) <= axis < len(tensors[0].shape)
        ):
            facts["axis_size"] = tensors[0].shape[axis]
        parts = tuple(part for weight in weights for part in weight.parts)
        self.ops.append(
            OpFacts(
                operation,
                facts,
                facts.setdefault("flops", 0),
                facts.get("reduction") or 0,
                parts,
                tuple(sources),
            )
        )
        self._makers |= dict.fromkeys((item.name for item in operation.outputs), index)
        if operation.type == "write_state":  # what reads the state from here on depends on it
            self._makers |= {
                value: index for value in operation.inputs["input"] if isinstance(value, str)
            }

    def _stored(self, operation: Operation) -> Iterator[Weight | None]:
        for key, group in operation.inputs.items():
            for value in group:
                yield self._weights.get(
                    value if isinstance(value, str) else f"{operation.name}.{key}"
                )

    def _literals(self, operation: Operation) -> dict[str, Any]:
        """Small literal parameters by name, which parameters are constant, and whether one holds an
        infinity."""
        facts: dict[str, Any] = {"infinite_constant": False}
        constant = set()
        for key, group in operation.inputs.items():
            found = [self._constant(value) for value in group]
            if found and all(is_constant for is_constant, _ in found):
                constant.add(key)
            if len(found) == 1 and (literal := found[0][1]) is not None and _is_small(literal):
                value = literal.load()
                facts[f"arg_{key}"] = _plain(value)
                facts["infinite_constant"] |= (
                    isinstance(value, np.ndarray)
                    and value.dtype.kind == "f"
                    and bool(np.isinf(value).any())
                )
        return facts | {"constants": frozenset(constant)}

    def _constant(self, value: Argument) -> tuple[bool, Constant | None]:
        if isinstance(value, Constant):
            return True, value
        return value in self._constants, self._constants.get(value)

    def _shape(self, operation: Operation, key: str) -> tuple[int | None, ...] | None:
        for value in operation.inputs.get(key, ()):
            kind = _tensor(value.type if isinstance(value, Constant) else self._types[value])
            return kind.shape if kind else None
        return None

    def _traffic(self, operation: Operation, results: list[TensorType]) -> dict[str, Any]:
        """Elements and bytes of what goes in, of the first that is computed, of the first output,
        and of the literal parameters; weights as the type that they are expanded to."""
        data: list[TensorType] = []
        parameters: list[TensorType] = []
        for value in (value for group in operation.inputs.values() for value in group):
            _, literal = self._constant(value)
            kind = _tensor(literal.type if literal else self._types[str(value)])
            if kind is not None and kind.dtype != "string":
                (parameters if literal and _is_small(literal) else data).append(kind)
        counted = [kind for kind in parameters if kind.dtype != "bool"]
        running = (_tensor(self._types[value]) for value in self._running(operation))
        first = [kind for kind in running if kind is not None][:1]
        return {
            "elements_first": sum(map(_elements, first)),
            "elements_in": sum(map(_elements, data)),
            "elements_out": sum(map(_elements, results[:1])),
            "elements_literal": sum(map(_elements, counted)),
            "bytes_first": sum(map(_bytes, first)),
            "bytes_in": sum(map(_bytes, data)),
            "bytes_out": sum(map(_bytes, results[:1])),
            "bytes_literal": sum(map(_bytes, parameters)),
        }

    def _product(self, operation: Operation, results: list[TensorType]) -> dict[str, Any]:
        """Sizes of the operations that multiply and add: length of the sums, and flops over all
        results."""
        facts: dict[str, Any] = {}
        weight, x = self._shape(operation, "weight"), self._shape(operation, "x")
        if operation.type in ("conv", "conv_transpose") and weight and x and len(weight) >= 3:
            facts = _convolution(operation.type, weight, x)
        elif operation.type == "linear" and weight:
            facts = {"reduction": weight[-1], "channels_out": weight[0]}
        elif operation.type == "matmul" and x:
            turned = (
                _flag(self._constant(operation.inputs["transpose_x"][0])[1])
                if ("transpose_x" in operation.inputs)
                else False
            )
            facts = {"reduction": x[-2] if turned and len(x) > 1 else x[-1]}
        elif operation.type == "scaled_dot_product_attention":
            return _attention(self._shape(operation, "query"), self._shape(operation, "key"))
        depth = facts.get("reduction")
        return facts | ({"flops": 2 * depth * sum(map(_elements, results))} if depth else {})


def _convolution(
    kind: str, weight: tuple[int | None, ...], x: tuple[int | None, ...]
) -> dict[str, Any]:
    out, per_group, *kernel = (size or 1 for size in weight)
    channels = x[1] if len(x) > 1 else None
    reduction = per_group * math.prod(kernel)
    groups = max(1, (channels or per_group) // (out if kind == "conv_transpose" else per_group))
    return {
        "channels_in": channels,
        "channels_out": out,
        "groups": groups,
        "reduction": reduction,
        "kernel_w": kernel[-1],
        "kernel_h": kernel[-2] if len(kernel) > 1 else 1,
    }


def _attention(
    query: tuple[int | None, ...] | None, key: tuple[int | None, ...] | None
) -> dict[str, Any]:
    """Two products: over the channels of a head, and over the keys."""
    if not query or not key:
        return {}
    head, keys = query[-1] or 1, key[-2] or 1
    return {
        "reduction": max(head, keys),
        "flops": 4 * math.prod(size or 1 for size in query) * keys,
    }


def _shapes(tensors: list[TensorType]) -> dict[str, Any]:
    """Rank and longest extent on each of the engine's axes, over inputs and outputs."""
    longest: dict[str, int] = {}
    for kind in tensors:
        for axis, size in zip(AXES.get(len(kind.shape), ""), kind.shape, strict=False):
            longest[axis] = max(longest.get(axis, 0), size or 0)
    return {"rank": max((len(kind.shape) for kind in tensors), default=0), **longest}


def feature_facts(role: str, name: str, kind: TensorType) -> dict[str, Any]:
    """What the rules may ask of an input, an output or a state."""
    last = kind.shape[-1] if kind.shape else None
    return _shapes([kind]) | {"role": role, "name": name, "dtype": kind.dtype, "last_axis": last}


def _span(feature: Feature) -> int:
    """How many sizes the most flexible axis of an input may have."""
    if not feature.ranges:
        return 1
    return max(
        (UNBOUNDED if high < 0 else high - low + 1 for low, high in feature.ranges), default=1
    )


def _file_bytes(weights: Iterable[Weight]) -> int:
    """Size of the largest weight file in use (what is stored up to its last constant where there is
    no file)."""
    ends: dict[str, int] = {}
    for weight in weights:
        for key, nbytes in weight.parts:
            if key is not None:
                ends[key[0]] = max(ends.get(key[0], 0), key[1] + nbytes)
    sizes = [
        Path(path).stat().st_size if Path(path).is_file() else end for path, end in ends.items()
    ]
    return max(sizes, default=0)


def _parallel_projections(ops: list[OpFacts]) -> int:
    """How many convolutions or linear layers with weights read the same value: two per expert where
    all are packed."""
    readers = Counter(
        value
        for op in ops
        if op.operation.type in ("conv", "linear") and "weight" in op.facts["constants"]
        for value in op.operation.inputs.get("x", ())
        if isinstance(value, str)
    )
    return max(readers.values(), default=0)


def _tensor(kind: ValueType) -> TensorType | None:
    tensor = kind.tensor if isinstance(kind, StateType) else kind
    return tensor if isinstance(tensor, TensorType) else None


def _elements(kind: TensorType) -> int:
    return math.prod(size or 1 for size in kind.shape)


def _bytes(kind: TensorType) -> int:
    return _elements(kind) * ELEMENT_BYTES.get(kind.dtype, WIDE_BYTES)


def _is_small(literal: Constant) -> bool:
    inline = isinstance(literal.type, TensorType) and literal.blob is None
    return inline and literal.nbytes <= SMALL_BYTES


def _flag(literal: Constant | None) -> bool:
    return literal is not None and bool(np.asarray(literal.load()).item())


def _plain(value: np.ndarray | str | tuple) -> Any:
    """Scalars as Python's, arrays as flat tuples."""
    if not isinstance(value, np.ndarray):
        return value
    return value.item() if value.ndim == 0 else tuple(value.reshape(-1).tolist())
