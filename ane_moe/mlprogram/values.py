"""Types and literals of a serialized program -> `program` dataclasses; literals are checked now and
loaded later."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ane_moe.errors import UserError
from ane_moe.mlprogram.blob import BlobFile
from ane_moe.mlprogram.container import AbsentFile, Container, quoted
from ane_moe.mlprogram.program import (
    Constant,
    DictionaryType,
    ListType,
    OtherType,
    StateType,
    TensorType,
    ValueType,
    VariadicType,
)
from ane_moe.mlprogram.proto import MIL_pb2
from ane_moe.mlprogram.storage import STORAGE, Storage, decode, stored_size

MAX_ELEMENTS = 1 << 32  # of one tensor: twice a 256k-token embedding of width 8192
MAX_RANK = 16  # Core ML itself stops at 5 for most ops

_DAMAGED = "the package is damaged, or its converter is faulty"

DTYPE_NAMES = {
    MIL_pb2.BOOL: "bool",
    MIL_pb2.STRING: "string",
    MIL_pb2.FLOAT8E4M3FN: "fp8e4m3fn",
    MIL_pb2.FLOAT8E5M2: "fp8e5m2",
    MIL_pb2.FLOAT16: "fp16",
    MIL_pb2.FLOAT32: "fp32",
    MIL_pb2.FLOAT64: "fp64",
    MIL_pb2.BFLOAT16: "bf16",
    MIL_pb2.INT4: "int4",
    MIL_pb2.INT8: "int8",
    MIL_pb2.INT16: "int16",
    MIL_pb2.INT32: "int32",
    MIL_pb2.INT64: "int64",
    MIL_pb2.UINT1: "uint1",
    MIL_pb2.UINT2: "uint2",
    MIL_pb2.UINT3: "uint3",
    MIL_pb2.UINT4: "uint4",
    MIL_pb2.UINT6: "uint6",
    MIL_pb2.UINT8: "uint8",
    MIL_pb2.UINT16: "uint16",
    MIL_pb2.UINT32: "uint32",
    MIL_pb2.UINT64: "uint64",
}

# Which repeated field of a TensorValue holds a type, after coremltools' _tensor_field_by_type; the
# rest use `bytes`.
_FIELDS = {
    "bool": "bools",
    "string": "strings",
    "fp32": "floats",
    "fp64": "doubles",
    "int16": "ints",
    "uint16": "ints",
    "int32": "ints",
    "uint32": "ints",
    "int64": "longInts",
    "uint64": "longInts",
}
_ELEMENTS = {"bools": "?", "ints": "<i4", "longInts": "<i8", "floats": "<f4", "doubles": "<f8"}


def read_type(proto: Any) -> ValueType:
    """Translate a MIL ValueType. Raises UserError for unknown element types and impossible
    shapes."""
    kind = proto.WhichOneof("type")
    if kind == "tensorType":
        return _tensor_type(proto.tensorType.SerializeToString())
    if kind == "stateType":
        wrapped = read_type(proto.stateType.wrappedType)
        if not isinstance(wrapped, TensorType):
            raise UserError(
                "program declares a state that is not a tensor", describe(wrapped), _DAMAGED
            )
        return StateType(wrapped)
    if kind == "listType":
        return ListType(read_type(proto.listType.type), _dimension(proto.listType.length))
    if kind == "dictionaryType":
        pair = proto.dictionaryType
        return DictionaryType(read_type(pair.keyType), read_type(pair.valueType))
    if kind is None:
        raise UserError("program leaves a value without a type", "an empty type", _DAMAGED)
    return OtherType(kind.removesuffix("Type"))


def describe(kind: ValueType) -> str:
    """A type as text, e.g. `fp16[1,64,1,?]`; `...` stands for any number of dimensions."""
    if isinstance(kind, TensorType):
        unknown = "..." if isinstance(kind, VariadicType) else "?"
        shape = ",".join(unknown if size is None else str(size) for size in kind.shape)
        return f"{kind.dtype}[{shape}]"
    if isinstance(kind, StateType):
        return f"state<{describe(kind.tensor)}>"
    if isinstance(kind, ListType):
        return f"list<{describe(kind.element)}, {'?' if kind.length is None else kind.length}>"
    if isinstance(kind, DictionaryType):
        return f"dictionary<{describe(kind.key)}, {describe(kind.value)}>"
    return kind.kind


@lru_cache(maxsize=1024)  # functions have few types, and name each of them again and again
def _tensor_type(serialized: bytes) -> ValueType:
    proto = MIL_pb2.TensorType.FromString(serialized)
    if proto.dataType not in DTYPE_NAMES:
        raise UserError(
            "program uses an unknown element type",
            f"code {proto.dataType}",
            "a newer ane-moe may know it",
        )
    if proto.rank == -1:
        return VariadicType(DTYPE_NAMES[proto.dataType], (None,))
    if proto.rank != len(proto.dimensions) or proto.rank > MAX_RANK:
        raise UserError(
            "program declares an impossible tensor rank",
            f"rank {proto.rank} with {len(proto.dimensions)} dimensions",
            _DAMAGED,
        )
    shape = tuple(_dimension(dimension) for dimension in proto.dimensions)
    if math.prod(size for size in shape if size) > MAX_ELEMENTS:
        raise UserError(
            "program declares a tensor that is too large",
            quoted(shape),
            f"limit: {MAX_ELEMENTS} elements",
        )
    variadic = any(dimension.unknown.variadic for dimension in proto.dimensions)
    return (VariadicType if variadic else TensorType)(DTYPE_NAMES[proto.dataType], shape)


def _dimension(proto: Any) -> int | None:
    kind = proto.WhichOneof("dimension")
    if kind is None:
        raise UserError(
            "program declares a dimension without a size", "an empty dimension", _DAMAGED
        )
    return proto.constant.size if kind == "constant" else None


@dataclass
class ValueReader:
    """Reads literals of one package; blob files are opened once and shared by all its constants.

    Without `require_weights` a weight file may be absent: its constants raise when loaded, and
    `absent` says what is wrong with each file, by name.
    """

    container: Container
    require_weights: bool = True
    absent: dict[str, UserError] = field(default_factory=dict)
    _paths: dict[str, Path] = field(default_factory=dict)
    _blobs: dict[Path, BlobFile] = field(default_factory=dict)

    def read(self, proto: Any, where: str) -> Constant:
        """Check a MIL Value and wrap it. `where` names it in errors. Raises UserError."""
        kind = read_type(proto.type)
        source = proto.WhichOneof("value")
        if source == "blobFileValue":
            return self._from_file(proto.blobFileValue, kind, where)
        if source is None:
            raise _mismatch(where, "no value", kind)
        return self._immediate(proto.immediateValue, kind, where)

    def _from_file(self, proto: Any, kind: ValueType, where: str) -> Constant:
        shape, storage = _static(kind, where)
        if storage is None or storage.name == "bool":
            raise _mismatch(where, "a value in the weight file", kind)
        blob = self._blob(proto.fileName)
        if blob is None:
            return self._absent(proto, kind, stored_size(storage, math.prod(shape)))
        entry = blob.entry(proto.offset, storage, math.prod(shape))
        blob_range = (blob.path, entry.offset, entry.nbytes)
        return Constant(
            kind,
            lambda: blob.read(entry).reshape(shape),
            blob_range,
            entry.nbytes,
            lambda: blob.raw(entry),
        )

    def _absent(self, proto: Any, kind: ValueType, nbytes: int) -> Constant:
        error = self.absent[proto.fileName]

        def load() -> np.ndarray:
            raise error

        return Constant(kind, load, (Path(proto.fileName), proto.offset, nbytes), nbytes)

    def _blob(self, name: str) -> BlobFile | None:
        """The weight file of this name; None where it is absent and may be."""
        if name in self.absent:
            return None
        if name not in self._paths:
            try:
                self._paths[name] = self.container.weight_file(name)
            except AbsentFile as error:
                if self.require_weights:
                    raise
                self.absent[name] = error
                return None
        path = self._paths[name]
        if path not in self._blobs:
            self._blobs[path] = BlobFile(path)
        return self._blobs[path]

    def _immediate(self, proto: Any, kind: ValueType, where: str) -> Constant:
        source = proto.WhichOneof("value")
        if isinstance(kind, TensorType):
            if source != "tensor":
                raise _mismatch(where, f"a {source} value", kind)
            return _immediate_tensor(proto.tensor, kind, where)
        if _source(kind) != source:
            raise _mismatch(where, f"a {source} value", kind)
        if source == "dictionary":
            pairs = [
                (self.read(item.key, where), self.read(item.value, where))
                for item in proto.dictionary.values
            ]
            return Constant(
                kind,
                lambda: tuple((key.load(), value.load()) for key, value in pairs),
                nbytes=sum(key.nbytes + value.nbytes for key, value in pairs),
            )
        items = [self.read(item, where) for item in getattr(proto, source).values]
        return Constant(
            kind,
            lambda: tuple(item.load() for item in items),
            nbytes=sum(item.nbytes for item in items),
        )


def _source(kind: ValueType) -> str:
    """The field that holds a literal of this type."""
    if isinstance(kind, OtherType):
        return kind.kind
    return {ListType: "list", DictionaryType: "dictionary"}.get(type(kind), "")


def _immediate_tensor(proto: Any, kind: TensorType, where: str) -> Constant:
    shape, storage = _static(kind, where)
    count = math.prod(shape)
    source = proto.WhichOneof("value") or "nothing"
    if source == "nothing" and count:
        raise _mismatch(where, "no value", kind)
    if source not in (_FIELDS.get(kind.dtype, "bytes"), "bytes", "nothing") or (
        source == "bytes" and storage is None
    ):
        raise _mismatch(where, f"a value in `{source}`", kind)
    stored: Any = () if source == "nothing" else getattr(proto, source).values
    expected = stored_size(storage, count) if source == "bytes" and storage else count
    if len(stored) != expected:
        raise _mismatch(
            where, f"{len(stored)} {'bytes' if source == 'bytes' else 'elements'}", kind
        )
    if storage is None:
        return Constant(
            kind, lambda: stored[0] if shape == () else tuple(stored), nbytes=sum(map(len, stored))
        )
    return Constant(
        kind, _loader(storage, source, stored, shape, where), nbytes=stored_size(storage, count)
    )


def _loader(
    storage: Storage, source: str, stored: Any, shape: tuple[int, ...], where: str
) -> Callable[[], np.ndarray]:
    def load() -> np.ndarray:
        if source in ("bytes", "nothing"):
            return decode(
                storage, np.frombuffer(bytes(stored), np.uint8), math.prod(shape)
            ).reshape(shape)
        values = np.fromiter(stored, _ELEMENTS[source], len(stored)).reshape(shape)
        if storage.stored.kind in "iu" and values.size:
            limits = np.iinfo(storage.stored)
            if values.min() < limits.min or values.max() > limits.max:
                raise UserError(
                    f"{where} holds numbers that its type cannot",
                    f"{values.min()} to {values.max()}",
                    f"declared {storage.name}",
                )
        return values.astype(storage.stored, copy=False)

    return load


def _static(kind: ValueType, where: str) -> tuple[tuple[int, ...], Storage | None]:
    """Shape and element type of a literal's type; None stands for strings."""
    if not isinstance(kind, TensorType):
        raise _mismatch(where, "a tensor", kind)
    if any(size is None for size in kind.shape):
        raise UserError(f"{where} is a constant of unknown size", describe(kind), _DAMAGED)
    shape = tuple(size for size in kind.shape if size is not None)
    return shape, None if kind.dtype == "string" else STORAGE[kind.dtype]


def _mismatch(where: str, found: str, kind: ValueType) -> UserError:
    return UserError(f"{where} does not match its declared type {describe(kind)}", found, _DAMAGED)
