"""A program as text, for reading: one line per operation, small literals in place, large ones
named."""

from collections.abc import Iterator

import numpy as np

from ane_moe.mlprogram.program import (
    Argument,
    Block,
    Constant,
    Function,
    Operation,
    Output,
    Program,
)
from ane_moe.mlprogram.values import describe

SHOWN_ELEMENTS = 8  # literals up to this size are written out where they are used
SHOWN_CHARACTERS = 80

_INDENT = "  "


def program_text(program: Program) -> Iterator[str]:
    """Lines of text: each function with its operations in order. Raises UserError for a literal
    that does not load."""
    for function in program.functions.values():
        yield from function_text(function)


def function_text(function: Function) -> Iterator[str]:
    """Lines of text of one function."""
    yield f"{printable(function.name)}({_values(function.inputs)}) opset {function.opset} {{"
    yield from _block_body(function.block, {}, _INDENT)
    yield "}"


def printable(text: str) -> str:
    """Untrusted text with control characters escaped: a name must not be able to drive the
    terminal."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _block_body(block: Block, outer: dict[str, str], indent: str) -> Iterator[str]:
    literals = dict(outer)
    for op in block.operations:
        value = op.attributes.get("val")
        if op.type == "const" and value is not None and _is_small(value):
            literals[op.outputs[0].name] = _literal(value)
        else:
            yield from _operation(op, literals, indent)
    yield (
        f"{indent}return {', '.join(literals.get(name, printable(name)) for name in block.outputs)}"
    )


def _operation(op: Operation, literals: dict[str, str], indent: str) -> Iterator[str]:
    inputs = [f"{printable(key)}={_arguments(value, literals)}" for key, value in op.inputs.items()]
    attributes = [f"{printable(key)}={_literal(value)}" for key, value in op.attributes.items()]
    target = f"{_values(op.outputs)} = " if op.outputs else ""
    yield f"{indent}{target}{printable(op.type)}({', '.join(inputs + attributes)})" + (
        " {" if op.blocks else ""
    )
    for index, block in enumerate(op.blocks):
        if index:
            yield f"{indent}}} {{"
        if block.inputs:
            yield f"{indent}{_INDENT}({_values(block.inputs)})"
        yield from _block_body(block, literals, indent + _INDENT)
    if op.blocks:
        yield f"{indent}}}"


def _values(values: tuple[Output, ...]) -> str:
    return ", ".join(f"{printable(value.name)}: {describe(value.type)}" for value in values)


def _arguments(arguments: tuple[Argument, ...], literals: dict[str, str]) -> str:
    shown = [
        _literal(item) if isinstance(item, Constant) else literals.get(item, printable(item))
        for item in arguments
    ]
    return shown[0] if len(shown) == 1 else f"({', '.join(shown)})"


def _is_small(value: Constant) -> bool:
    return value.blob is None and value.nbytes <= SHOWN_ELEMENTS * 8


def _literal(value: Constant) -> str:
    if value.blob:
        path, offset, nbytes = value.blob
        return f"<{describe(value.type)} at {offset} of {printable(path.name)}, {nbytes} bytes>"
    if not _is_small(value) and describe(value.type) != "string[]":
        return f"<{describe(value.type)} inline, {value.nbytes} bytes>"
    loaded = value.load()
    text = str(loaded.tolist()) if isinstance(loaded, np.ndarray) else printable(repr(loaded))
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
