"""How the weights of a function are stored: found from its const and constexpr_* operations,
without loading any."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ane_moe.errors import UserError
from ane_moe.mlprogram.program import (
    Argument,
    Block,
    Constant,
    Function,
    Operation,
    TensorType,
    ValueType,
)

MAX_STEPS = 8  # of constexpr operations upon each other; joint formats take 3
MAX_PARAMETERS = 16  # of one constexpr operation; they have at most 6

BlobKey = tuple[str, int]  # file and data offset: constants with the same key are stored once
# Where a piece is stored (None: inline in the program) and its bytes.
Part = tuple[BlobKey | None, int]


@dataclass(frozen=True)
class Weight:
    """One weight as its user sees it. `format` is e.g. "fp16", "lut4 g16", "int8 per channel",
    "sparse 50% lut4"."""

    name: str
    format: str
    shape: tuple[int | None, ...]
    elements: int
    stored_bytes: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class _Parameter:
    """A parameter of a constexpr operation: a literal, or the result of another constexpr
    operation."""

    type: ValueType
    format: str
    parts: tuple[Part, ...]
    steps: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return _shape(self.type)


def weights_of(function: Function) -> tuple[Weight, ...]:
    """All constants of a function that lie in the weight file or are the result of constexpr
    operations.

    Raises UserError for constexpr operations stacked in a way that no weight format has.
    """
    made: dict[str, _Parameter] = {}
    makers: dict[str, int] = {}
    weights: dict[int, list[Weight]] = {}  # by operation, in program order
    for index, op in enumerate(operations_of(function.block)):
        if (op.type != "const" and not op.type.startswith("constexpr_")) or not op.outputs:
            weights[index] = list(_direct_weights(op))
            continue
        arguments = _arguments(op)
        for value in arguments.values():
            if isinstance(value, str) and value in makers:
                weights.pop(makers[value], None)  # a step towards another weight
        expanded = _expand(op, arguments, made)
        made |= expanded
        makers |= dict.fromkeys(expanded, index)
        name = op.outputs[0].name
        if any(key for key, _ in expanded[name].parts):
            weights[index] = [_weight(name, expanded[name])]
    return tuple(weight for found in weights.values() for weight in found)


def operations_of(block: Block) -> Iterator[Operation]:
    """Every operation of a block, those of nested blocks included."""
    for op in block.operations:
        yield op
        for nested in op.blocks:
            yield from operations_of(nested)


def unique_bytes(weights: Iterable[Weight]) -> int:
    """Bytes of all parts; what is stored once and used several times counts once."""
    shared: dict[BlobKey, int] = {}
    inline = 0
    for weight in weights:
        for key, nbytes in weight.parts:
            if key is None:
                inline += nbytes
            else:
                shared[key] = nbytes
    return inline + sum(shared.values())


def _weight(name: str, value: _Parameter) -> Weight:
    stored = sum(nbytes for _, nbytes in value.parts)
    return Weight(name, value.format, value.shape, math.prod(value.shape), stored, value.parts)


def _direct_weights(op: Operation) -> Iterator[Weight]:
    """Weight-file constants given directly as an argument."""
    for key, arguments in op.inputs.items():
        for value in arguments:
            if isinstance(value, Constant) and value.blob:
                yield _weight(f"{op.name}.{key}", _literal(value))


def _arguments(op: Operation) -> dict[str, Argument]:
    """Parameters of a constexpr operation: attributes up to iOS 17, inputs from iOS 18 on."""
    arguments = {**op.attributes, **{key: values[0] for key, values in op.inputs.items() if values}}
    if len(arguments) > MAX_PARAMETERS:
        raise UserError(
            f"{op.type} has too many parameters", str(len(arguments)), "the package is damaged"
        )
    return arguments


def _expand(
    op: Operation, arguments: dict[str, Argument], made: dict[str, _Parameter]
) -> dict[str, _Parameter]:
    """What each output of a const or constexpr operation is stored as."""
    parameters = {}
    for key, value in arguments.items():
        if isinstance(value, Constant):
            parameters[key] = _literal(value)
        elif value in made:
            parameters[key] = made[value]
    steps = 1 + max((item.steps for item in parameters.values()), default=0)
    if steps > MAX_STEPS:
        raise UserError(
            "constexpr operations are stacked too deep", f"{steps} steps", "the package is damaged"
        )
    # The mask of a joint format is a parameter of each of its steps: it is stored once.
    parts = tuple(dict.fromkeys(part for item in parameters.values() for part in item.parts))
    describe = _FORMATS.get(op.type)
    word = describe(parameters, _shape(op.outputs[0].type)) if describe else op.type
    return {output.name: _Parameter(output.type, word, parts, steps) for output in op.outputs}


def _literal(value: Constant) -> _Parameter:
    key = (str(value.blob[0]), value.blob[1]) if value.blob else None
    word = value.type.dtype if isinstance(value.type, TensorType) else "?"
    return _Parameter(value.type, word, ((key, value.nbytes),))


def _shape(kind: ValueType) -> tuple[int, ...]:
    return tuple(size or 0 for size in kind.shape) if isinstance(kind, TensorType) else ()


_ABSENT = _Parameter(TensorType("?", ()), "?", ())


def _granularity(data: tuple[int, ...], parameter: tuple[int, ...], word: str) -> str:
    """Over which axes a parameter (scale, palette) varies: "per tensor", "per channel", or `word`
    and sizes."""
    groups = [whole // part for whole, part in zip(data, parameter, strict=False) if part > 1]
    if not groups:
        return "per tensor"
    sizes = [str(group) for group in groups if group > 1]
    return word + "x".join(sizes) if sizes else "per channel"


def _const(parameters: dict[str, _Parameter], shape: tuple[int, ...]) -> str:
    return parameters.get("val", _ABSENT).format


def _lut(parameters: dict[str, _Parameter], shape: tuple[int, ...]) -> str:
    """Palettes are `[entries]` up to iOS 17 and `[groups per axis ..., entries, vector]` from iOS
    18 on."""
    lut = parameters.get("lut", _ABSENT)
    entries, vector = lut.shape[-2:] if len(lut.shape) > 1 else (*lut.shape, 1, 1)[:2]
    words = [f"lut{max(entries - 1, 1).bit_length()}"]
    if "indices_mask" not in parameters:
        words.append(_granularity(shape, lut.shape[:-2], "g"))
    if vector > 1:
        words.append(f"vectors of {vector}")
    return " ".join(words) + (f", palette {lut.format}" if lut.steps else "")


def _affine(parameters: dict[str, _Parameter], shape: tuple[int, ...]) -> str:
    several = math.prod(parameters.get("scale", _ABSENT).shape) > 1
    return (
        f"{parameters.get('quantized_data', _ABSENT).format} "
        f"{'per channel' if several else 'per tensor'}"
    )


def _blockwise(parameters: dict[str, _Parameter], shape: tuple[int, ...]) -> str:
    data = parameters.get("data", _ABSENT)
    return (
        f"{data.format} "
        f"{_granularity(data.shape, parameters.get('scale', _ABSENT).shape, 'block ')}"
    )


def _sparse_blockwise(parameters: dict[str, _Parameter], shape: tuple[int, ...]) -> str:
    scale, mask = parameters.get("scale", _ABSENT), parameters.get("data_mask", _ABSENT)
    return (
        f"{parameters.get('nonzero_data', _ABSENT).format} "
        f"{_granularity(mask.shape, scale.shape, 'block ')}"
    )


def _sparse(parameters: dict[str, _Parameter], shape: tuple[int, ...]) -> str:
    kept = parameters.get("nonzero_data", _ABSENT)
    total = math.prod(shape)
    share = f"{100 * (1 - math.prod(kept.shape) / total):.0f}%" if total else "?"
    return f"sparse {share} {kept.format}"


def _cast(parameters: dict[str, _Parameter], shape: tuple[int, ...]) -> str:
    return parameters.get("source_val", _ABSENT).format


_FORMATS: dict[str, Callable[[dict[str, _Parameter], tuple[int, ...]], str]] = {
    "const": _const,
    "constexpr_affine_dequantize": _affine,
    "constexpr_blockwise_shift_scale": _blockwise,
    "constexpr_cast": _cast,
    "constexpr_lut_to_dense": _lut,
    "constexpr_lut_to_sparse": _lut,
    "constexpr_sparse_blockwise_shift_scale": _sparse_blockwise,
    "constexpr_sparse_to_dense": _sparse,
}
