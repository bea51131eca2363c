"""Programs made in memory, of any size: their weights are declared, not stored."""

import math
from pathlib import Path

import numpy as np

from ane_moe.mlprogram.program import (
    Block,
    Constant,
    Feature,
    Function,
    Interface,
    Operation,
    Output,
    Program,
    StateType,
    TensorType,
)

BITS = {"fp16": 16, "fp32": 32, "int8": 8, "int4": 4}
Shape = tuple[int | None, ...]


class Graph:
    """Adds one operation per call; values are named by the returned strings. `main` is the only
    function."""

    def __init__(
        self,
        opset: str = "CoreML8",
        dtype: str = "fp16",
        weights: str = "int8",
        converter: str = "9.0",
    ):
        self.opset, self.dtype, self.weights, self.converter = opset, dtype, weights, converter
        self.operations: list[Operation] = []
        self.types: dict[str, TensorType] = {}
        self.features: dict[str, list[Feature]] = {"input": [], "state": []}
        self.offset = 64

    def input(
        self,
        name: str,
        shape: Shape,
        dtype: str = "",
        ranges: tuple[tuple[int, int], ...] | None = None,
        shapes: tuple[tuple[int, ...], ...] = (),
    ) -> str:
        kind = self.types[name] = TensorType(dtype or self.dtype, shape)
        self.features["input"].append(Feature(name, kind, ranges=ranges, shapes=shapes))
        return name

    def state(self, name: str, shape: Shape) -> str:
        kind = self.types[name] = TensorType("fp16", shape)
        self.features["state"].append(Feature(name, kind, kind="state"))
        return name

    def weight(self, shape: tuple[int, ...], bits: int | None = None) -> str:
        """A stored weight: fp16 and fp32 as `const`, the others as a per-channel
        `constexpr_affine_dequantize`."""
        kind = TensorType(self.dtype, shape)
        if self.weights in ("fp16", "fp32"):
            return self._add(
                "const", {}, kind, {"val": self._stored(TensorType(self.weights, shape))}
            )
        scale = TensorType("fp16", (shape[0],))
        return self._add(
            "constexpr_affine_dequantize",
            {},
            kind,
            {
                "quantized_data": self._stored(TensorType(self.weights, shape)),
                "scale": self._stored(scale),
                "zero_point": literal(np.int8(0)),
                "axis": literal(np.int32(0)),
            },
        )

    def op(
        self,
        kind: str,
        shape: Shape,
        /,
        dtype: str = "",
        blocks: tuple[Block, ...] = (),
        **inputs: object,
    ) -> str:
        """Inputs are names of values, tuples of names, or literals."""
        arguments = {
            key: value
            if isinstance(value, tuple) and value and isinstance(value[0], str)
            else (value if isinstance(value, str) and value in self.types else literal(value),)
            for key, value in inputs.items()
        }
        return self._add(kind, arguments, TensorType(dtype or self.dtype, shape), {}, blocks)

    def size(self, x: str, axis: int) -> int:
        """The size of an axis, which is fixed."""
        size = self.types[x].shape[axis]
        assert size is not None
        return size

    def conv(self, x: str, out: int) -> str:
        """A 1x1 convolution."""
        shape = self.types[x].shape
        weight = self.weight((out, self.size(x, 1), 1, 1))
        return self.op("conv", (shape[0], out, *shape[2:]), x=x, weight=weight)

    def linear(self, x: str, out: int) -> str:
        shape = self.types[x].shape
        return self.op(
            "linear", (*shape[:-1], out), x=x, weight=self.weight((out, self.size(x, -1)))
        )

    def matmul(self, x: str, y: str, transpose_y: bool = False) -> str:
        a, b = self.types[x].shape, self.types[y].shape
        return self.op(
            "matmul",
            (*a[:-1], b[-2] if transpose_y else b[-1]),
            x=x,
            y=y,
            transpose_x=False,
            transpose_y=transpose_y,
        )

    def same(self, kind: str, x: str, y: object = None) -> str:
        """An elementwise operation."""
        return self.op(kind, self.types[x].shape, **({"x": x} if y is None else {"x": x, "y": y}))

    def cast(self, x: str, dtype: str) -> str:
        result = TensorType(dtype, self.types[x].shape)
        return self._add("cast", {"x": (x,), "dtype": (literal(dtype),)}, result, {})

    def norm(self, x: str) -> str:
        """RMS norm over the channels, in five operations."""
        shape = self.types[x].shape
        power = self.op(
            "reduce_mean",
            (shape[0], 1, *shape[2:]),
            x=self.same("mul", x, x),
            axes=[1],
            keep_dims=True,
        )
        return self.same(
            "mul",
            self.same("mul", x, self.same("rsqrt", power)),
            self.weight((1, self.size(x, 1), 1, 1)),
        )

    def swiglu(self, x: str, width: int) -> str:
        gate, up = self.conv(x, width), self.conv(x, width)
        hidden = self.same("mul", self.same("silu", gate), up)
        return self.conv(hidden, self.size(x, 1))

    def reshape(self, x: str, shape: Shape) -> str:
        return self.op("reshape", shape, x=x, shape=list(shape))

    def attention(
        self,
        x: str,
        heads: int,
        head: int,
        kv_heads: int | None = None,
        slots: int | None = None,
        project: bool = True,
    ) -> str:
        """Self-attention of rank 4; with `slots` over caches that are states, written by mask."""
        kv, tokens = kv_heads or heads, self.size(x, -1)
        q = self.reshape(self.conv(x, heads * head), (1, kv, head, tokens * heads // kv))
        k, v = (self.reshape(self.conv(x, kv * head), (1, kv, head, tokens)) for _ in "kv")
        if slots:
            k, v = self._cached(k, slots), self._cached(v, slots)
        width = slots or tokens
        scores = self.op(
            "matmul",
            (1, kv, tokens * heads // kv, width),
            x=q,
            y=k,
            transpose_x=True,
            transpose_y=False,
        )
        mixed = self.matmul(
            self.op("softmax", self.types[scores].shape, x=scores, axis=-1), v, transpose_y=True
        )
        flat = self.reshape(mixed, (1, heads * head, 1, tokens))
        return self.conv(flat, self.size(x, 1)) if project else flat

    def program(self, *outputs: str) -> Program:
        inputs = tuple(Output(feature.name, feature.type) for feature in self.features["input"])
        inputs += tuple(
            Output(feature.name, StateType(feature.type)) for feature in self.features["state"]
        )
        results = tuple(Feature(name, self.types[name]) for name in outputs)
        function = Function("main", self.opset, inputs, Block((), tuple(self.operations), outputs))
        interface = Interface(tuple(self.features["input"]), results, tuple(self.features["state"]))
        return Program(
            Path("published.mlpackage"),
            {"main": function},
            {"main": interface},
            "main",
            9,
            {"com.github.apple.coremltools.version": self.converter},
        )

    def _cached(self, new: str, slots: int) -> str:
        shape, tokens = self.types[new].shape, self.types[new].shape[-1]
        name = f"cache_{len(self.features['state'])}"
        self.state(name, (*shape[:-1], slots))
        if "write" not in self.types:
            self.input("write", (1, 1, tokens, slots))
            self.input("keep", (1, 1, 1, slots))
        kept = self.same("mul", self.op("read_state", self.types[name].shape, input=name), "keep")
        written = self.same("add", kept, self.matmul(new, "write"))
        self.operations.append(
            Operation("write_state", f"write_{name}", {"input": (name,), "data": (written,)}, ())
        )
        return self.op("read_state", self.types[name].shape, input=name)

    def _stored(self, kind: TensorType) -> Constant:
        nbytes = math.prod(size or 1 for size in kind.shape) * BITS[kind.dtype] // 8
        self.offset += 64 + (nbytes + 63) // 64 * 64
        return Constant(kind, _no_value, (Path("/nowhere/weight.bin"), self.offset, nbytes), nbytes)

    def _add(
        self,
        kind: str,
        inputs: dict,
        result: TensorType,
        attributes: dict,
        blocks: tuple[Block, ...] = (),
    ) -> str:
        name = f"{kind}_{len(self.operations)}"
        self.types[name] = result
        self.operations.append(
            Operation(kind, name, inputs, (Output(name, result),), blocks, attributes)
        )
        return name


def literal(value: object) -> Constant:
    if isinstance(value, str):
        return Constant(TensorType("string", ()), lambda: value)
    array = np.asarray(value)
    names = {"b": "bool", "i": "int32" if array.dtype != np.int8 else "int8", "f": "fp16"}
    return Constant(
        TensorType(names[array.dtype.kind], array.shape), lambda: array, nbytes=array.nbytes
    )


def _no_value() -> np.ndarray:
    raise AssertionError("placement read a weight")
