"""`.mlpackage` at protobuf and blob level: bind weights to templates and write the package,
atomically.

One package may hold many copies of a template, each with weights of its own: the experts of a
layer. A copy is told from the others by its prefix, which goes before the names of its functions
and weights.

A package is a folder: Manifest.json, Data/com.apple.CoreML/model.mlmodel (the protobuf) and
weights/weight.bin (the blob file). It appears under its final name only when it is complete.
"""

import hashlib
import json
import math
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ane_moe.emit.coreml.expansions import FILE, expansion_operations
from ane_moe.emit.coreml.template import Template, value_name
from ane_moe.files import disk_error, is_hidden, replaced, sha256
from ane_moe.formats.encoded import Encoded, Expansion, Stored
from ane_moe.mlprogram.blob_writer import BlobWriter
from ane_moe.mlprogram.proto import MIL_pb2, Model_pb2
from ane_moe.model.template_key import function_name, weight_name

MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
MANIFEST = "Manifest.json"
CONTENT_KEY = "ane_moe.content_key"
SHORT = 4096  # bytes, of which a key takes all

Weight = np.ndarray | Encoded


@dataclass(frozen=True)
class Written:
    """A finished package: its content key, and the sha256 of its files by path inside it."""

    content_key: str
    files: dict[str, str]


def stamp(
    templates: Mapping[str, Template],
    values: Iterable[tuple[str, Weight]],
    key: "ContentKey",
    path: Path,
    more_arrays: int = 0,
    shared: Mapping[str, str] | None = None,
    writer: str = "",
) -> Written:
    """Write the package `path` from templates by prefix and their weights, each (name, fp16 array
    or encoded); these are stored as one array each, and `more_arrays` together. `shared` weights
    (name: another's) have no value of their own. `writer` is as of `replaced`.

    One weight is in memory at a time. The first function of the first copy is the default. `key` is
    asked for its digest after the last value was read. Raises UserError when the disk is full; an
    interrupted call leaves nothing at `path`.
    """
    try:
        with replaced(path, writer) as temporary:
            (temporary / WEIGHTS).parent.mkdir(parents=True)
            arrays = sum(len(template.weights) for template in templates.values())
            arrays += more_arrays - len(shared or {})
            with BlobWriter(temporary / WEIGHTS, arrays) as blob:
                places = _place(values, blob, templates, shared or {})
            content_key = key.digest()
            model = _bound(templates, places)
            model.description.metadata.userDefined[CONTENT_KEY] = content_key
            beside = {
                MODEL: model.SerializeToString(deterministic=True),
                MANIFEST: _item_manifest(content_key).encode(),
            }
            for name, data in beside.items():
                (temporary / name).write_bytes(data)
    except (OSError, RuntimeError) as error:
        raise disk_error(error, path) from error
    files = {name: hashlib.sha256(data).hexdigest() for name, data in beside.items()}
    return Written(content_key, files | {WEIGHTS: blob.sha256})


class ContentKey:
    """The identity of a shard: the stored weights it was made of, its graph, and the tools that
    made it.

    A hasher for `Checkpoint.read`; what else decides the result is given at the start. Numbers
    count by the CRC-32 of each piece that is read: a key tells one set of weights from another,
    where nobody gains by two that have the same, and sha256 takes five times as long.
    """

    def __init__(self, *facts: object):
        self._sha = hashlib.sha256(repr(_told(facts)).encode())

    def update(self, data: Any) -> None:
        """Feed stored bytes."""
        view = memoryview(data)
        many = view.nbytes > SHORT
        self._sha.update(f"{view.nbytes} {zlib.crc32(view)}\n".encode() if many else view)

    def digest(self) -> str:
        """sha256, hex."""
        return self._sha.hexdigest()


def _told(fact: object) -> object:
    """What a key says of a fact. Fields of their default are left out, so that a field that comes
    later leaves the keys of what has no use for it as they are."""
    if is_dataclass(fact) and not isinstance(fact, type):
        values = {field.name: (getattr(fact, field.name), field.default) for field in fields(fact)}
        unusual = {name: _told(own) for name, (own, usual) in values.items() if own != usual}
        return type(fact).__name__, unusual
    if isinstance(fact, Mapping):
        return {key: _told(value) for key, value in fact.items()}
    return tuple(map(_told, fact)) if isinstance(fact, tuple | list) else fact


def read_content_key(path: Path) -> str | None:
    """The content key of a package of ours, or None when there is no such package."""
    try:
        model = Model_pb2.Model.FromString((path / MODEL).read_bytes())
    except (OSError, ValueError):
        return None
    return model.description.metadata.userDefined.get(CONTENT_KEY)


def file_hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder`, by path relative to it, without hidden files."""
    return {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(_files(folder))}


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and not is_hidden(path))


@dataclass(frozen=True)
class _Place:
    """Where the parts of a weight lie in the blob file: by input for each of its expansions, or one
    offset."""

    offset: int = 0
    expansions: tuple[tuple[Expansion, Mapping[str, int]], ...] = ()


def _place(
    values: Iterable[tuple[str, Weight]],
    writer: BlobWriter,
    templates: Mapping[str, Template],
    shared: Mapping[str, str],
) -> dict[str, _Place]:
    """Places by weight name. Checks that each weight of each copy comes once, with as many elements
    as traced."""
    shapes = {
        weight_name(prefix, name): shape
        for prefix, template in templates.items()
        for name, shape in template.weights.items()
    }
    places: dict[str, _Place] = {}
    for name, value in values:
        size, type_ = extent(value)
        if size != math.prod(shapes[name]) or type_ != "fp16" or name in places:
            raise ValueError(
                f"weight {name}: {type_}, {size} elements, does not fit {shapes[name]}"
            )
        places[name] = _store(writer, value)
    for name, other in shared.items():
        if name in places or math.prod(shapes[name]) != math.prod(shapes[other]):
            raise ValueError(f"weight {name}: {shapes[name]}, cannot be {other} {shapes[other]}")
        places[name] = places[other]
    if missing := shapes.keys() - places.keys():
        raise ValueError(f"no value for {sorted(missing)[:5]}")
    return places


def extent(value: Weight) -> tuple[int, str]:
    """Elements of a weight once expanded, and their type."""
    if isinstance(value, Encoded):
        type_, shape = value.expansions[-1].outputs[-1]
        return math.prod(shape), type_
    return value.size, "fp16" if value.dtype == np.float16 else str(value.dtype)


def _store(writer: BlobWriter, value: Weight) -> _Place:
    if not isinstance(value, Encoded):
        return _Place(writer.add(value, "fp16"))
    placed = []
    for expansion in value.expansions:
        inputs = {
            name: writer.add(part.values, part.type)
            for name, part in expansion.inputs.items()
            if isinstance(part, Stored)
        }
        placed.append((_without_values(expansion), inputs))
    return _Place(expansions=tuple(placed))


def _without_values(expansion: Expansion) -> Expansion:
    """The expansion with arrays that take no memory: their shapes and types are still needed when
    it is written."""
    inputs = {
        name: replace(part, values=np.broadcast_to(part.values.dtype.type(0), part.values.shape))
        if isinstance(part, Stored)
        else part
        for name, part in expansion.inputs.items()
    }
    return replace(expansion, inputs=inputs)


def _bound(templates: Mapping[str, Template], places: Mapping[str, _Place]) -> Model_pb2.Model:
    """One specification with the functions of every copy, each weight pointing into the blob
    file."""
    parsed: dict[int, Model_pb2.Model] = {}
    for template in templates.values():
        if id(template) not in parsed:
            parsed[id(template)] = Model_pb2.Model.FromString(template.model)
    model = Model_pb2.Model()
    model.CopyFrom(parsed[id(next(iter(templates.values())))])
    model.mlProgram.functions.clear()
    del model.description.functions[:]
    for prefix, template in templates.items():
        mine = {value_name(name): places[weight_name(prefix, name)] for name in template.weights}
        source, bound = parsed[id(template)], set[str]()
        for description in source.description.functions:
            name = function_name(prefix, description.name)
            model.description.functions.add().CopyFrom(description)
            model.description.functions[-1].name = name
            model.mlProgram.functions[name].CopyFrom(source.mlProgram.functions[description.name])
            bound |= _bind(model.mlProgram.functions[name], mine)
        if bound != mine.keys():
            raise ValueError(f"unbound weights: {sorted(mine.keys() - bound)[:5]}")
    model.description.defaultFunctionName = model.description.functions[0].name
    return model


def _bind(function: MIL_pb2.Function, places: Mapping[str, _Place]) -> set[str]:
    """Point every weight of one function to its place in the blob file; expansions take the place
    of its `const`. Returns which it has: others may be of other functions."""
    block = function.block_specializations[function.opset]
    operations = list(block.operations)
    bound = set()
    for operation in operations:
        name = operation.outputs[0].name if operation.type == "const" else ""
        if name in places:
            value = operation.attributes["val"].blobFileValue
            value.fileName, value.offset = FILE, places[name].offset
            bound.add(name)
    if any(place.expansions for place in places.values()):
        del block.operations[:]
        for operation in operations:
            name = operation.outputs[0].name if operation.outputs else ""
            place = places.get(name, _Place())
            block.operations.extend(expansion_operations(name, place.expansions) or [operation])
    return bound


def _item_manifest(content_key: str) -> str:
    """Manifest.json. Identifiers are derived from the content, so that the same input gives the
    same bytes."""
    items = {"model.mlmodel": "CoreML Model Specification", "weights": "CoreML Model Weights"}
    identifiers = {
        name: str(uuid.uuid5(uuid.NAMESPACE_OID, content_key + name)).upper() for name in items
    }
    entries = {
        identifiers[name]: {
            "author": "com.apple.CoreML",
            "description": description,
            "name": name,
            "path": f"com.apple.CoreML/{name}",
        }
        for name, description in items.items()
    }
    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": entries,
        "rootModelIdentifier": identifiers["model.mlmodel"],
    }
    return json.dumps(manifest, indent=4, sort_keys=True) + "\n"
