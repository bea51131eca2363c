"""One op at a time: coremltools declares its types and, where it can, computes its value; our
runtime executes it."""

import os
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import coremltools as ct
import numpy as np
import torch
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import Function as MilFunction
from coremltools.converters.mil.mil import types

from ane_moe.mlprogram.program import (
    Argument,
    Block,
    Constant,
    Feature,
    Function,
    Interface,
    Operation,
    Output,
    Program,
    TensorType,
)
from ane_moe.runtime.reference.runtime import ReferenceFunction

torch.set_num_threads(1)

Data = np.ndarray | list[np.ndarray]

DTYPES = {
    np.dtype(np.float16): "fp16",
    np.dtype(np.float32): "fp32",
    np.dtype(np.bool_): "bool",
    np.dtype(np.int8): "int8",
    np.dtype(np.uint8): "uint8",
    np.dtype(np.int16): "int16",
    np.dtype(np.uint16): "uint16",
    np.dtype(np.int32): "int32",
    np.dtype(np.uint32): "uint32",
}
OPSETS = {
    ct.target.iOS15: "CoreML5",
    ct.target.iOS16: "CoreML6",
    ct.target.iOS17: "CoreML7",
    ct.target.iOS18: "CoreML8",
}


def declare(
    op: str, tensors: dict[str, Data], params: dict[str, Any], target: Any
) -> list[TensorType]:
    """The output types coremltools infers for `op`."""
    flat = _flatten(tensors)
    holders = {
        name: mb.placeholder(
            array.shape, types.string_to_builtin(DTYPES[array.dtype]), allow_rank0_input=True
        )
        for name, array in flat.items()
    }
    with MilFunction(holders, opset_version=target) as function:
        given = {
            name: [function.inputs[f"{name}_{i}"] for i in range(len(data))]
            if isinstance(data, list)
            else function.inputs[name]
            for name, data in tensors.items()
        }
        out = getattr(mb, op)(**given, **params)
    return [_type_of(var) for var in (out if isinstance(out, list | tuple) else [out])]


def infer(
    op: str, tensors: dict[str, Data], params: dict[str, Any], target: Any = ct.target.iOS18
) -> list[np.ndarray]:
    """The values coremltools itself computes for `op` on constants (its value inference)."""
    with MilFunction({}, opset_version=target):
        out = getattr(mb, op)(**tensors, **params)
    return [np.asarray(var.val) for var in (out if isinstance(out, list | tuple) else [out])]


def run(
    op: str,
    tensors: dict[str, Data],
    params: dict[str, Any] | None = None,
    target: Any = ct.target.iOS18,
    precision: Any = "fp32",
    outputs: list[TensorType] | None = None,
) -> list[np.ndarray]:
    """What the reference runtime computes, with outputs declared as coremltools does (or as
    `outputs` says)."""
    params = params or {}
    flat = _flatten(tensors)
    arguments: dict[str, tuple[Argument, ...]] = {
        name: tuple(f"{name}_{i}" for i in range(len(data))) if isinstance(data, list) else (name,)
        for name, data in tensors.items()
    }
    arguments |= {name: _constants(value) for name, value in params.items()}
    declared = outputs if outputs is not None else declare(op, tensors, params, target)
    results = tuple(Output(f"out_{i}", kind) for i, kind in enumerate(declared))
    operation = Operation(op, op, arguments, results)
    inputs = tuple(
        Output(name, TensorType(DTYPES[array.dtype], array.shape)) for name, array in flat.items()
    )
    names = tuple(result.name for result in results)
    function = Function("main", OPSETS[target], inputs, Block((), (operation,), names))
    interface = Interface(
        tuple(Feature(i.name, i.type) for i in inputs),
        tuple(Feature(o.name, o.type) for o in results),
    )
    program = Program(None, {"main": function}, {"main": interface}, "main", 9, {})
    out = ReferenceFunction(program, "main", precision).predict(flat)
    return [out[name] for name in names]


def constant(value: Any) -> Constant:
    """`value` as a literal of a program."""
    if isinstance(value, str):
        return Constant(TensorType("string", ()), lambda: value)
    array = np.asarray(value)
    if array.dtype == np.int64:
        array = array.astype(np.int32)
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    return Constant(
        TensorType(DTYPES[array.dtype], array.shape), lambda: array, nbytes=array.nbytes
    )


def _constants(value: Any) -> tuple[Constant, ...]:
    return tuple(constant(one) for one in value) if isinstance(value, tuple) else (constant(value),)


def _flatten(tensors: dict[str, Data]) -> dict[str, np.ndarray]:
    flat: dict[str, np.ndarray] = {}
    for name, data in tensors.items():
        flat |= (
            {f"{name}_{i}": one for i, one in enumerate(data)}
            if isinstance(data, list)
            else {name: data}
        )
    return flat


def _type_of(var: Any) -> TensorType:
    shape = tuple(
        int(size) if isinstance(size, int | np.integer | float) else None for size in var.shape
    )
    return TensorType(types.builtin_to_string(var.dtype), shape)


def assert_same(
    ours: np.ndarray, theirs: np.ndarray, rtol: float = 2e-6, atol: float = 1e-6
) -> None:
    """Equal, or for floats within `rtol` / `atol` (fp16: one rounding apart); NaN and Inf in the
    same places."""
    assert ours.shape == tuple(theirs.shape)
    if ours.dtype == np.float16:
        rtol, atol = max(rtol, 1.5e-3), max(atol, 1e-6)
    np.testing.assert_allclose(
        ours.astype(np.float64), theirs.astype(np.float64), rtol=rtol, atol=atol
    )
