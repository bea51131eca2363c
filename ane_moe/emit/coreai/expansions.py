"""Expansions as Core AI's operations: what is stored stays as it is, and is expanded on the device.

Its symmetric forms have offsets of zero here, which are one number each in the asset.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ane_moe.emit.coreai.told import Packed
from ane_moe.formats.encoded import Expansion, Stored
from ane_moe.mlprogram.storage import STORAGE
from ane_moe.runtime.coreai.installed import core_ai

Native = Any  # a value of a graph that is being written
Held = Mapping[str, Any]  # the arrays of one expansion by input, as attributes of constants


def resource(packed: Packed) -> Any:
    """A stored array as the attribute of a constant, which shares its memory."""
    ir = core_ai("coreai._compiler.ir")
    kind = ir.RankedTensorType.get(list(packed.shape), element_type(packed.type))
    return ir.DenseResourceElementsAttr.get_from_buffer(packed.bytes, packed.name, kind)


def element_type(name: str) -> Any:
    """Core AI's type of a stored element."""
    ir, storage = core_ai("coreai._compiler.ir"), STORAGE[name]
    if name == "fp16":
        return ir.F16Type.get()
    integer = ir.IntegerType
    return (integer.get_signed if storage.signed else integer.get_unsigned)(storage.bits)


def constant(attribute: Any) -> Native:
    """A value of the graph at the current place."""
    return _dialect().ConstantOp(value=attribute).result


def expanded(expansions: Sequence[tuple[Expansion, Held]]) -> Native:
    """The value that the operations of an encoded weight give, written at the current place."""
    made: list[Native] = []
    for expansion, held in expansions:
        values = {
            name: constant(held[name]) if isinstance(part, Stored) else made[part[0]]
            for name, part in expansion.inputs.items()
        }
        made.append(OPERATIONS[expansion.type](**values, **expansion.integers))
    return made[-1]


def _shift_scale(data: Native, scale: Native, offset: Native | None = None) -> Native:
    sizes = scale.type.shape
    shift = _zeros(sizes, data.type.element_type) if offset is None else offset
    added = _zeros(sizes, scale.type.element_type)
    return _dialect().blockwise_shift_scale(data, scale, shift, added)


def _looked_up(indices: Native, lut: Native, vector_axis: int = 0) -> Native:
    return _dialect().lut_to_dense(indices, lut, _axis(vector_axis))


def _sparse(nonzero: Native, mask: Native) -> Native:
    return _dialect().build_sparse_with_bitmask(nonzero, mask)


def _sparse_to_dense(nonzero_data: Native, mask: Native) -> Native:
    """Of plain numbers; what an earlier operation gave stands where it belongs already."""
    if nonzero_data == mask:
        return nonzero_data
    return _dialect().sparse_with_bitmask_to_dense(_sparse(nonzero_data, mask))


def _sparse_looked_up(indices_mask: Native, indices_nonzero_data: Native, lut: Native) -> Native:
    native, found = _dialect(), _sparse(indices_nonzero_data, indices_mask)
    return native.sparse_with_bitmask_to_dense(
        native.lut_to_sparse_with_bitmask(found, lut, _axis(0))
    )


def _sparse_shift_scale(data_mask: Native, nonzero_data: Native, scale: Native) -> Native:
    """Zeros stay zeros, whatever they are multiplied by."""
    native = _dialect()
    dense = native.sparse_with_bitmask_to_dense(_sparse(nonzero_data, data_mask))
    return _shift_scale(dense, scale)


def _axis(number: int) -> Native:
    return _dialect().constant(np.array(number, np.int16))


def _zeros(sizes: Sequence[int], element: Any) -> Native:
    ir = core_ai("coreai._compiler.ir")
    is_real = isinstance(element, ir.F16Type)
    zero = ir.FloatAttr.get(element, 0.0) if is_real else ir.IntegerAttr.get(element, 0)
    kind = ir.RankedTensorType.get(list(sizes), element)
    return constant(ir.DenseElementsAttr.get_splat(kind, zero))


def _dialect() -> Any:
    return core_ai("coreai._compiler.dialects.coreai")


OPERATIONS: dict[str, Callable[..., Native]] = {
    "constexpr_blockwise_shift_scale": _shift_scale,
    "constexpr_lut_to_dense": _looked_up,
    "constexpr_sparse_to_dense": _sparse_to_dense,
    "constexpr_lut_to_sparse": _sparse_looked_up,
    "constexpr_sparse_blockwise_shift_scale": _sparse_shift_scale,
}
