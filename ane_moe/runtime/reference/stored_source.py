"""How a constant matrix is stored, from the program: a constant, or the constexpr operations that
expand it."""

from collections.abc import Callable, Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from ane_moe.errors import UserError
from ane_moe.mlprogram.program import TensorType
from ane_moe.mlprogram.storage import STORAGE, stored_size
from ane_moe.runtime.reference.dtypes import to_torch
from ane_moe.runtime.reference.op_error import OpError
from ane_moe.runtime.reference.scope import Expansion, Value
from ane_moe.runtime.reference.steps import target
from ane_moe.runtime.reference.stored_rows import (
    Codes,
    Made,
    OddCodes,
    Palettes,
    Rows,
    Scaled,
    Whole,
    mapped,
)

NARROW, WIDE = FLOATS = ("fp16", "fp32")
INLINE_BYTES = 1024  # constants in the program that are equal count as one
AS_TORCH = {
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int8": torch.int8,
    "uint8": torch.uint8,
}
CODES = ("int4", "uint1", "uint2", "uint3", "uint4", "uint6", "uint8")

Shape = tuple[int, int]


def matrix_shape(value: Value, ranks: range) -> Shape | None:
    """(O, I) of a constant or compressed weight in fp16 or fp32, of shape `(O, I)` or
    `(O, I, 1, ..)` and one of `ranks`; None of anything else."""
    if value.constant is None and value.expansion is None:
        return None
    return shape_as_matrix(value, ranks)


def shape_as_matrix(value: Value, ranks: range) -> Shape | None:
    """The same of any value, constant or not."""
    kind = value.type
    if not isinstance(kind, TensorType) or kind.dtype not in FLOATS or len(kind.shape) not in ranks:
        return None
    rows, columns, *others = kind.shape
    if not rows or not columns or any(size != 1 for size in others):
        return None
    return rows, columns


def key_of(value: Value) -> Hashable:
    """What is equal for values that are stored in one place and mean the same."""
    if value.expansion is not None:
        step = value.expansion
        given = tuple(key_of(one) if one else None for one in step.given)
        place = step.results.index(value)
        return (step.op.name, step.op.since, repr(step.parameters), given, place, value.type)
    constant = value.constant
    assert constant is not None
    if constant.blob is not None:
        return constant.blob, constant.type
    loaded = constant.load() if constant.nbytes <= INLINE_BYTES else None
    return (constant.type, loaded.tobytes()) if isinstance(loaded, np.ndarray) else constant


def source_of(value: Value, shape: Shape) -> Rows:
    """Where the rows of a matrix come from."""
    found = None
    if value.expansion is not None and value.expansion.op.name in FORMS:
        found = FORMS[value.expansion.op.name](value.expansion, shape, _dtype(value) == NARROW)
    elif value.expansion is None:
        found = Whole(_numbers(value).view(shape))
    return found or Made(lambda: _tensor(value).view(shape))


def _tensor(value: Value) -> Tensor:
    """The value itself, by the kernels of the operations that expand it."""
    if value.expansion is None:
        return _numbers(value)
    step = value.expansion
    given = [None if one is None else _tensor(one) for one in step.given]
    if step.op.half == "widen":
        given = [x.float() if x is not None and x.is_floating_point() else x for x in given]
    try:
        made = step.kernel(*given)
        results = made if isinstance(made, tuple) else (made,)
        place = step.results.index(value)
        result = target(0, value.type, step.op.half == "widen").fit(results[place])
        assert isinstance(result, Tensor)
        return result
    except UserError as error:
        raise OpError(step.op.name, step.name, step.where, error) from None
    except Exception as error:  # whatever an untrusted program can make a kernel raise
        failed = UserError("it cannot be computed", str(error).split("\n")[0])
        raise OpError(step.op.name, step.name, step.where, failed) from error


def _numbers(value: Value) -> Tensor:
    """A constant: over the file's own memory where it is stored as it is held."""
    constant, dtype = value.constant, _dtype(value)
    assert constant is not None
    if constant.raw is None or dtype not in AS_TORCH or 0 in _sizes(value):
        return to_torch(np.asarray(constant.load()), dtype)
    return mapped(constant.raw()).view(AS_TORCH[dtype]).view(_sizes(value))


def _whole_numbers(value: Value, shape: Shape) -> Rows | None:
    """Rows of quantized data, None of a form that is not known here."""
    if value.expansion is not None:
        known = value.expansion.op.name == "constexpr_lut_to_dense"
        return _palettes(value.expansion, shape, False) if known else None
    dtype = _dtype(value)
    if dtype in ("int8", "uint8"):
        return Whole(_numbers(value).view(shape))
    codes = _codes(value, shape, dtype)
    if codes is None:
        return None
    numbers = torch.arange(1 << STORAGE[dtype].bits).float()
    if STORAGE[dtype].signed:
        numbers[len(numbers) // 2 :] -= len(numbers)
    return Palettes(codes, numbers.view(1, 1, -1), shape[0])


def _codes(value: Value, shape: Shape, dtype: str) -> Codes | OddCodes | None:
    """Packed whole numbers of `dtype`; None where rows do not begin at bytes."""
    constant = value.constant
    if constant is None or constant.raw is None or dtype not in CODES:
        return None
    storage, raw = STORAGE[dtype], constant.raw()
    if len(raw) != stored_size(storage, shape[0] * shape[1]):
        return None
    if 8 % storage.bits:
        return OddCodes(raw, storage, shape[1])
    return Codes(mapped(raw).view(shape[0], -1), storage.bits) if len(raw) % shape[0] == 0 else None


def _blockwise(step: Expansion, shape: Shape, narrow: bool) -> Rows | None:
    data, scale, offset = step.given
    assert data is not None and scale is not None
    grid, rows = _grid(_sizes(scale), shape), _whole_numbers(data, shape)
    if rows is None or grid is None or not _is_constant(scale):
        return None
    if offset is not None and (_sizes(offset) != _sizes(scale) or not _is_constant(offset)):
        return None
    shift = None if offset is None else _numbers(offset).view(grid)
    return Scaled(rows, _numbers(scale).view(grid), shift, shape[0] // grid[0], narrow)


def _affine(step: Expansion, shape: Shape, narrow: bool) -> Rows | None:
    data, zero, scale = step.given
    assert data is not None and zero is not None and scale is not None
    axis = step.parameters["axis"] % len(_sizes(data))
    rows = _whole_numbers(data, shape)
    counts = {_numbers(value).numel() for value in (zero, scale)}
    if rows is None or axis > 1 or counts - {1, shape[axis]}:
        return None
    grid = (shape[0], 1) if axis == 0 else (1, shape[1])
    shift, factor = (
        _numbers(value).flatten().expand(shape[axis]).reshape(grid) for value in (zero, scale)
    )
    return Scaled(rows, factor, shift, shape[0] // grid[0], narrow)


def _palettes(step: Expansion, shape: Shape, narrow: bool) -> Rows | None:
    indices, lut = step.given
    assert indices is not None and lut is not None
    if step.op.since < 18:  # one palette, which says how many bits are packed
        groups, entries, vector = [1, 1], _tensor(lut).numel(), 1
        dtype = f"uint{(entries - 1).bit_length()}"
    else:
        *groups, entries, vector = _sizes(lut)
        dtype = _dtype(indices)
    grid, codes = _grid(groups, shape), _codes(indices, shape, dtype)
    if grid is None or codes is None or vector != 1 or entries != 1 << STORAGE[dtype].bits:
        return None
    if shape[1] // grid[1] * codes.bits % 8:
        return None
    numbers = _tensor(lut).half() if narrow else _tensor(lut).float()
    return Palettes(codes, numbers.view(*grid, entries), shape[0] // grid[0])


def _grid(sizes: Sequence[int], shape: Shape) -> Shape | None:
    """The blocks that parameters of these sizes cut a matrix into, down and across; None where they
    do not divide it."""
    rows, columns, *others = sizes
    if not rows or not columns or shape[0] % rows or shape[1] % columns:
        return None
    return None if any(size != 1 for size in others) else (rows, columns)


def _is_constant(value: Value) -> bool:
    return value.constant is not None


def _sizes(value: Value) -> tuple[int, ...]:
    return (
        tuple(size or 0 for size in value.type.shape) if isinstance(value.type, TensorType) else ()
    )


def _dtype(value: Value) -> str:
    return value.type.dtype if isinstance(value.type, TensorType) else ""


FORMS: dict[str, Callable[[Expansion, Shape, bool], Rows | None]] = {
    "constexpr_affine_dequantize": _affine,
    "constexpr_blockwise_shift_scale": _blockwise,
    "constexpr_lut_to_dense": _palettes,
}
