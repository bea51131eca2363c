"""How a weight format looks in a package, in the words of `inspect` and the placement rules."""

import functools
from collections.abc import Iterator
from pathlib import Path

from ane_moe.formats.encoded import Expansion, Stored
from ane_moe.formats.recipe import find_format
from ane_moe.mlprogram.program import (
    Argument,
    Block,
    Constant,
    Function,
    Operation,
    Output,
    TensorType,
)
from ane_moe.mlprogram.weights import weights_of

NOWHERE = Path("weight.bin")


@functools.cache
def stored_form(name: str) -> str:
    """The form of weights in the format called `name`, such as `lut4 g16` or `int8 per channel`.

    Found by encoding a sample and reading it back. Raises UserError where there is no such format.
    """
    encoded = find_format(name).sample()
    if encoded is None:
        return "fp16"
    operations = tuple(_operation(number, step) for number, step in enumerate(encoded.expansions))
    (weight,) = weights_of(Function("main", "CoreML8", (), Block((), operations, ())))
    return weight.format


def _operation(number: int, expansion: Expansion) -> Operation:
    outputs = tuple(
        Output(f"{number}.{place}", TensorType(dtype, shape))
        for place, (dtype, shape) in enumerate(expansion.outputs)
    )
    return Operation(expansion.type, str(number), dict(_inputs(number, expansion)), outputs)


def _inputs(number: int, expansion: Expansion) -> Iterator[tuple[str, tuple[Argument, ...]]]:
    """Stored arrays as constants of the weight file, each at a place of its own."""
    for place, (key, value) in enumerate(expansion.inputs.items()):
        if isinstance(value, Stored):
            yield key, (_constant(value, len(expansion.inputs) * number + place),)
        else:
            yield key, (f"{value[0]}.{value[1]}",)


def _constant(stored: Stored, offset: int) -> Constant:
    kind, size = TensorType(stored.type, stored.values.shape), stored.stored_bytes
    return Constant(kind, lambda: stored.values, (NOWHERE, offset, size), size)
