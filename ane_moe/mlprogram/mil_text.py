"""The text of an ML Program (`model.mil` of a compiled model) -> the protobuf of the same program.

The form is not documented. It was learnt from public compiled models, above all those whose
package is public too: a function's operations one by one, each constant with its type, floats in
hexadecimal. Nested blocks (cond, while_loop) occur in none of them and are refused.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from ane_moe.errors import UserError
from ane_moe.mlprogram.container import quoted
from ane_moe.mlprogram.proto import MIL_pb2
from ane_moe.mlprogram.storage import STORAGE, Storage, encode
from ane_moe.mlprogram.values import DTYPE_NAMES, MAX_RANK

MAX_TOKENS = 4_000_000  # about 100,000 operations; no more messages than the reader parses
MAX_TYPE_DEPTH = 8  # of list<dict<string, list<...>>>; real ones have 4
OPSETS = {
    "ios15": "CoreML5",
    "ios16": "CoreML6",
    "ios17": "CoreML7",
    "ios18": "CoreML8",
    "ios26": "CoreML9",
}

_CODES = {name: code for code, name in DTYPE_NAMES.items()}
_ESCAPES = {"\\": "\\", '"': '"', "'": "'", "n": "\n", "t": "\t", "r": "\r", "0": "\0"}
_TOKEN = re.compile(
    r"""\s*(?:
    (?P<text>"[^"\\]*(?:\\.[^"\\]*)*")
  | (?P<word>[A-Za-z_][\w.]*)
  | (?P<number>[-+]?(?:0[xX][\da-fA-F.]+(?:[pP][-+]?\d+)?|[\d.]+(?:[eE][-+]?\d+)?|inf\b|nan\b))
  | (?P<mark>->|[()\[\]{}<>=,;?])
  | (?P<end>\Z))""",
    re.VERBOSE | re.ASCII | re.DOTALL,
)

_DAMAGED = "the compiled model is damaged, or of a form that is not known here"


def parse_program(text: str, program: Any) -> None:
    """Fill `program`, an empty `MIL_pb2.Program`. Raises UserError for text that is not one."""
    tokens = _Tokens(text)
    tokens.expect("program")
    tokens.expect("(")
    version = tokens.take("number")
    if version.split(".")[0] != "1":
        raise UserError("model.mil is of an unknown version", quoted(version), "only 1.x is known")
    tokens.expect(")")
    _skip_attributes(tokens)
    tokens.expect("{")
    while not tokens.accept("}"):
        _function(tokens, program)
    tokens.take("end")


class _Tokens:
    """The tokens of a text, one at a time. `kind` and `token` are of the next one."""

    def __init__(self, text: str):
        self._text = text
        self._start = self._end = self._count = 0
        self.kind = self.token = ""
        self._advance()

    def take(self, kind: str) -> str:
        """The next token, which must be of this kind."""
        if self.kind != kind:
            raise self.error(f"a {kind}")
        token = self.token
        self._advance()
        return token

    def expect(self, token: str) -> None:
        if not self.accept(token):
            raise self.error(quoted(token))

    def accept(self, token: str) -> bool:
        """Step over the next token if it is this one; text in quotes never is."""
        if self.token != token or self.kind == "text":
            return False
        self._advance()
        return True

    def opens(self, *tokens: str) -> bool:
        """Whether one of `tokens` follows the next token."""
        match = _TOKEN.match(self._text, self._end)
        return match is not None and match.group(match.lastgroup or 0) in tokens

    def error(self, expected: str) -> UserError:
        line = self._text.count("\n", 0, self._start) + 1
        return UserError(
            "model.mil cannot be read",
            f"{quoted(self.token or 'the end')} in line {line}, expected {expected}",
            _DAMAGED,
        )

    def _advance(self) -> None:
        self._count += 1
        if self._count > MAX_TOKENS:
            raise UserError(
                "the program has too many parts", f"{MAX_TOKENS} or more", "cut it into shards"
            )
        match = _TOKEN.match(self._text, self._end)
        if match is None:
            self._start = self._end
            self.token = self._text[self._end : self._end + 20].strip()
            raise self.error("a token")
        self.kind = match.lastgroup or ""
        self.token = match.group(self.kind)
        self._start, self._end = match.start(self.kind), match.end()


def _function(tokens: _Tokens, program: Any) -> None:
    tokens.expect("func")
    name = tokens.take("word")
    if name in program.functions:
        raise UserError("model.mil defines a function twice", quoted(name), _DAMAGED)
    tokens.expect("<")
    tag = tokens.take("word")
    tokens.expect(">")
    if tag not in OPSETS:
        raise UserError(
            "model.mil uses an unknown opset", quoted(tag), f"known: {', '.join(OPSETS)}"
        )
    function = program.functions[name]
    function.opset = OPSETS[tag]
    tokens.expect("(")
    _separated(tokens, ")", lambda: _named(tokens, function.inputs.add()))
    _skip_attributes(tokens)
    tokens.expect("{")
    block = function.block_specializations[function.opset]
    while not tokens.accept("}"):
        _operation(tokens, block.operations.add())
    tokens.expect("->")
    tokens.expect("(")
    _separated(tokens, ")", lambda: block.outputs.append(tokens.take("word")))
    tokens.expect(";")


def _operation(tokens: _Tokens, op: Any) -> None:
    if not tokens.opens("("):  # otherwise it has no outputs, as write_state
        _named(tokens, op.outputs.add())
        while tokens.accept(","):
            _named(tokens, op.outputs.add())
        tokens.expect("=")
    op.type = tokens.take("word")
    tokens.expect("(")
    _separated(tokens, ")", lambda: _input(tokens, op))
    if tokens.accept("["):
        _separated(tokens, "]", lambda: _attribute(tokens, op))
    if tokens.token in ("{", "("):
        raise UserError(
            f"{quoted(op.type)} has blocks, which a compiled model is not read with",
            "model.mil",
            "use the .mlpackage it was compiled from",
        )
    tokens.expect(";")


def _input(tokens: _Tokens, op: Any) -> None:
    arguments = op.inputs[_key(tokens, op.inputs)].arguments
    if tokens.accept("("):
        _separated(tokens, ")", lambda: _argument(tokens, arguments.add()))
    else:
        _argument(tokens, arguments.add())


def _argument(tokens: _Tokens, binding: Any) -> None:
    if tokens.opens("<", "("):
        _typed(tokens, binding.value)
    else:
        binding.name = tokens.take("word")


def _attribute(tokens: _Tokens, op: Any) -> None:
    _typed(tokens, op.attributes[_key(tokens, op.attributes)])


def _key(tokens: _Tokens, known: Any) -> str:
    key = tokens.take("word")
    if key in known:
        raise UserError("model.mil names a parameter twice", quoted(key), _DAMAGED)
    tokens.expect("=")
    return key


def _named(tokens: _Tokens, named: Any) -> None:
    _type(tokens, named.type, MAX_TYPE_DEPTH)
    named.name = tokens.take("word")


def _separated(tokens: _Tokens, end: str, read: Callable[[], Any]) -> None:
    """Items between commas, up to and including `end`."""
    if tokens.accept(end):
        return
    read()
    while tokens.accept(","):
        read()
    tokens.expect(end)


def _skip_attributes(tokens: _Tokens) -> None:
    """Those of the program and of functions: build versions, and shapes that metadata.json has."""
    depth = 0
    while depth or (tokens.token == "[" and tokens.kind == "mark"):
        if tokens.kind == "mark":
            depth += (tokens.token in "([{") - (tokens.token in ")]}")
        tokens.take("text" if tokens.kind == "end" else tokens.kind)


# ---- types


def _type(tokens: _Tokens, kind: Any, depth: int) -> None:
    if not depth:
        raise tokens.error("types that are nested less deep")
    word = tokens.take("word")
    if word in _CODES:
        kind.tensorType.dataType, kind.tensorType.rank = _CODES[word], 0
    elif word in _COMPOSED:
        tokens.expect("<")
        _COMPOSED[word](tokens, kind, depth - 1)
        tokens.expect(">")
    else:
        raise UserError("model.mil uses an unknown type", quoted(word), _DAMAGED)


def _tensor(tokens: _Tokens, kind: Any, depth: int) -> None:
    tensor, word = kind.tensorType, tokens.take("word")
    if word not in _CODES:
        raise UserError("model.mil uses an unknown element type", quoted(word), _DAMAGED)
    tensor.dataType = _CODES[word]
    tokens.expect(",")
    tokens.expect("[")
    _separated(tokens, "]", lambda: _size(tokens, tensor.dimensions.add()))
    tensor.rank = len(tensor.dimensions)


def _state(tokens: _Tokens, kind: Any, depth: int) -> None:
    _type(tokens, kind.stateType.wrappedType, depth)


def _list(tokens: _Tokens, kind: Any, depth: int) -> None:
    _type(tokens, kind.listType.type, depth)
    tokens.expect(",")
    _size(tokens, kind.listType.length)


def _dict(tokens: _Tokens, kind: Any, depth: int) -> None:
    _type(tokens, kind.dictionaryType.keyType, depth)
    tokens.expect(",")
    _type(tokens, kind.dictionaryType.valueType, depth)


def _tuple(tokens: _Tokens, kind: Any, depth: int) -> None:
    _type(tokens, kind.tupleType.types.add(), depth)
    while tokens.accept(","):
        _type(tokens, kind.tupleType.types.add(), depth)


_COMPOSED = {"tensor": _tensor, "state": _state, "list": _list, "dict": _dict, "tuple": _tuple}


def _size(tokens: _Tokens, dimension: Any) -> None:
    if tokens.accept("?"):
        dimension.unknown.SetInParent()
    else:
        dimension.constant.size = _integer(tokens.take("number"), STORAGE["uint64"])


# ---- values


def _typed(tokens: _Tokens, value: Any) -> None:
    """`type(literal)` or `type(BLOBFILE(path = ..., offset = ...))`."""
    _type(tokens, value.type, MAX_TYPE_DEPTH)
    tokens.expect("(")
    if tokens.accept("BLOBFILE"):
        _blob(tokens, value.blobFileValue)
    else:
        _literal(tokens, value)
    tokens.expect(")")


def _blob(tokens: _Tokens, blob: Any) -> None:
    place: dict[str, Any] = {}
    tokens.expect("(")
    _separated(tokens, ")", lambda: _place(tokens, place))
    path, offset = (
        place.get(key, MIL_pb2.Value()).immediateValue.tensor for key in ("path", "offset")
    )
    if len(path.strings.values) != 1 or len(offset.bytes.values) != 8:
        raise UserError(
            "model.mil names no place in a weight file", quoted(sorted(place)), _DAMAGED
        )
    blob.fileName = path.strings.values[0]
    blob.offset = int.from_bytes(offset.bytes.values, "little")


def _place(tokens: _Tokens, place: dict[str, Any]) -> None:
    """`path = string(...)` or `offset = uint64(...)`: a literal, no BLOBFILE of its own."""
    key = _key(tokens, place)
    place[key] = MIL_pb2.Value()
    _type(tokens, place[key].type, MAX_TYPE_DEPTH)
    tokens.expect("(")
    _literal(tokens, place[key])
    tokens.expect(")")


def _literal(tokens: _Tokens, value: Any) -> None:
    """A literal of the type of `value`; recursion ends with the type's depth."""
    kind = value.type.WhichOneof("type")
    immediate = value.immediateValue
    if kind == "tensorType":
        _tensor_literal(tokens, value.type.tensorType, immediate.tensor)
    elif kind == "listType":
        tokens.expect("[")
        _separated(
            tokens,
            "]",
            lambda: _item(tokens, immediate.list.values.add(), value.type.listType.type),
        )
    elif kind == "dictionaryType":
        tokens.expect("{")
        _separated(
            tokens,
            "}",
            lambda: _pair(tokens, immediate.dictionary.values.add(), value.type.dictionaryType),
        )
    else:
        raise tokens.error("a literal of a tensor, list or dict")


def _item(tokens: _Tokens, value: Any, kind: Any) -> None:
    value.type.CopyFrom(kind)
    _literal(tokens, value)


def _pair(tokens: _Tokens, pair: Any, kind: Any) -> None:
    tokens.expect("{")
    _item(tokens, pair.key, kind.keyType)
    tokens.expect(",")
    _item(tokens, pair.value, kind.valueType)
    tokens.expect("}")


def _tensor_literal(tokens: _Tokens, kind: Any, tensor: Any) -> None:
    dtype = DTYPE_NAMES[kind.dataType]
    if len(kind.dimensions) > MAX_RANK:
        raise UserError("model.mil holds a literal of impossible rank", str(kind.rank), _DAMAGED)
    items: list[str] = []
    _elements(tokens, [dimension.constant.size for dimension in kind.dimensions], items)
    if dtype == "string":
        tensor.strings.values.extend(map(_unquoted, items))
    else:
        tensor.bytes.values = _stored(STORAGE[dtype], items)


def _elements(tokens: _Tokens, shape: list[int], items: list[str]) -> None:
    """Add the elements inside nested brackets; recursion ends with the rank."""
    if not shape:
        if tokens.kind not in ("number", "word", "text"):
            raise tokens.error("an element")
        items.append(tokens.take(tokens.kind))
        return
    start = len(items)
    tokens.expect("[")
    _separated(tokens, "]", lambda: _elements(tokens, shape[1:], items))
    if len(items) - start != math.prod(shape):
        raise UserError(
            "model.mil holds a literal of another shape than it declares",
            f"{len(items) - start} elements for {quoted(shape)}",
            _DAMAGED,
        )


def _stored(storage: Storage, items: list[str]) -> bytes:
    """The elements as the protobuf stores them."""
    if storage.name == "bool":
        values = np.array([_boolean(item) for item in items], np.bool_)
    elif storage.name in ("fp16", "fp32", "fp64"):
        with np.errstate(over="ignore"):
            values = np.array([_float(item) for item in items], np.float64).astype(storage.stored)
    elif storage.name.startswith(("int", "uint")):
        stored = np.dtype(np.int8) if storage.signed and storage.bits < 8 else storage.stored
        values = np.array([_integer(item, storage) for item in items], stored)
    else:
        raise UserError(
            "model.mil holds literals of a type whose text is not known",
            storage.name,
            "use the .mlpackage it was compiled from",
        )
    return encode(storage, values).tobytes()


def _boolean(text: str) -> bool:
    if text not in ("true", "false"):
        raise UserError("model.mil holds a truth value that is none", quoted(text), _DAMAGED)
    return text == "true"


def _float(text: str) -> float:
    try:
        return float.fromhex(text) if "x" in text.lower() else float(text)
    except (ValueError, OverflowError):
        raise UserError("model.mil holds a number that is none", quoted(text), _DAMAGED) from None


def _integer(text: str, storage: Storage) -> int:
    least = -(1 << storage.bits - 1) if storage.signed else 0
    try:
        value = int(text)
    except ValueError:
        raise UserError("model.mil holds a number that is none", quoted(text), _DAMAGED) from None
    if not least <= value < least + (1 << storage.bits):
        raise UserError(
            "model.mil holds a number that its type cannot",
            quoted(text),
            f"declared {storage.name}",
        )
    return value


def _unquoted(text: str) -> str:
    if not text.startswith('"'):
        raise UserError("model.mil holds text without quotes", quoted(text), _DAMAGED)
    return re.sub(r"\\(.)", _escaped, text[1:-1], flags=re.DOTALL)


def _escaped(match: re.Match) -> str:
    if match[1] not in _ESCAPES:
        raise UserError("model.mil holds an unknown escape", quoted(match[0]), _DAMAGED)
    return _ESCAPES[match[1]]
