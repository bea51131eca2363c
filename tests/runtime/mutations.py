"""Structure-aware damage to packages, driven by a `random.Random`; for the fuzz test and
scripts/fuzz_reader.py."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from ane_moe.errors import UserError
from ane_moe.mlprogram.blob import HEADER, METADATA
from ane_moe.mlprogram.pipeline import OpenPipeline, open_model
from ane_moe.mlprogram.printer import program_text
from ane_moe.mlprogram.program import Constant, Feature, Program
from ane_moe.mlprogram.proto import Model_pb2
from ane_moe.mlprogram.summary import summarize, summarize_pipeline
from ane_moe.mlprogram.weights import operations_of
from ane_moe.runtime import load_package
from ane_moe.runtime.reference import structural

MODEL = Path("Data/com.apple.CoreML/model.mlmodel")
WEIGHTS = Path("Data/com.apple.CoreML/weights/weight.bin")

NUMBERS = [
    0,
    1,
    2,
    3,
    7,
    8,
    63,
    64,
    65,
    127,
    128,
    255,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32,
    2**60,
    2**63 - 1,
    2**63,
    2**64 - 64,
    2**64 - 1,
    -1,
    -2,
    -(2**31),
    -(2**63),
]
TEXTS = [
    "",
    "x",
    "y",
    "val",
    "main",
    "CoreML5",
    "CoreML8",
    "const",
    "cond",
    "while_loop",
    "gather",
    "reshape",
    "fill",
    "constexpr_lut_to_dense",
    "..",
    "/",
    "@model_path/weights/weight.bin",
    "@model_path/../..",
    "\0",
    "é" * 300,
]
TEXT_TOKENS = [
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    "<",
    ">",
    ",",
    "=",
    ";",
    "?",
    "->",
    "tensor<",
    "list<",
    "state<",
    "dict<",
    "tuple<",
    "BLOBFILE(",
    '"',
    '"\\',
    "func",
    "program",
    "const",
    "cond",
    "[[",
    "0x1p+9999",
    "9" * 5000,
    "inf",
    "-inf",
    "nan",
    "true",
    "é",
    "\0",
]
METADATA_VALUES: list[Any] = [
    "[1]",
    "[-1, -1]",
    "[[1, 0]]",
    "[" * 3000,
    "[9223372036854775807]",
    "Image",
    "State",
    "Float16",
    "Int32",
    "0",
    "1",
]
MANIFEST_VALUES: list[Any] = [
    None,
    True,
    -1,
    2**70,
    1e308,
    "",
    "..",
    "/etc/passwd",
    "\0",
    "\ud800",
    "a" * 5000,
    [],
    {},
]

SEEDS = (
    "net_ios15_fp32",
    "net_ios18_fp16",
    "flexible",
    "enumerated",
    "lut4_ios16",
    "lut4_grouped",
    "lut2_vector",
    "int8_ios16",
    "int4_block",
    "sparse_ios16",
    "sparse_lut4",
    "sparse_int8",
    "stateful",
    "multifunction",
    "loop",
    "classifier",
    "pipeline",
    "net_ios15_fp32.mlmodelc",
    "flexible.mlmodelc",
    "enumerated.mlmodelc",
    "lut4_grouped.mlmodelc",
    "int8_ios16.mlmodelc",
    "sparse_lut4.mlmodelc",
    "stateful.mlmodelc",
    "multifunction.mlmodelc",
    "classifier.mlmodelc",
    "pipeline.mlmodelc",
)


def mutate(path: Path, random: Random) -> None:
    """Damage the package or compiled model at `path` in one to four places."""
    kinds = COMPILED_MUTATIONS if path.suffix == ".mlmodelc" else MUTATIONS
    for _ in range(random.choice([1, 1, 1, 2, 3, 4])):
        random.choice(kinds)(path, random)


def exercise(path: Path, execute: bool) -> bool:
    """Read, summarize, print and load (and run) a package. False if it was refused; only UserError
    may say so."""
    try:
        model = open_model(path)
        if isinstance(model, OpenPipeline):
            programs = [program.read() for program in model.programs()]
            summarize_pipeline(model)
        else:
            programs = [model.read()]
            summarize(programs[0])
        for program in programs:
            for _ in program_text(program):
                pass
            for constant in _constants(program):
                constant.load()
        if execute:
            _run(path, programs[0].functions if len(programs) == 1 else ["main"])
    except UserError as error:
        assert "\n" not in str(error)
        return False
    return True


def _run(path: Path, names: Iterable[str]) -> None:
    """Run each function once, loops for a short while."""
    structural.MAX_ITERATIONS = 200
    for name in names:
        function = load_package(path, name, runtime="reference")
        inputs = {feature.name: _array(feature) for feature in function.inputs}
        function.predict(inputs, function.make_state() if function.states else None)


def _array(feature: Feature) -> np.ndarray:
    """Ones (as an index: zeros) of the default shape, kept small: the size of inputs is the
    caller's choice."""
    shape = [size if size is not None and 0 <= size < 64 else 1 for size in feature.type.shape]
    dtypes = {"fp16": np.float16, "fp32": np.float32, "int32": np.int32}
    return np.full(
        shape[:6], feature.type.dtype != "int32", dtypes.get(feature.type.dtype, np.float32)
    )


def _constants(program: Program) -> Iterator[Constant]:
    for function in program.functions.values():
        for op in operations_of(function.block):
            yield from op.attributes.values()
            yield from (
                item
                for values in op.inputs.values()
                for item in values
                if isinstance(item, Constant)
            )


def _program_fields(path: Path, random: Random) -> None:
    """Change, drop, double or move one field somewhere in the program."""
    model = _parsed(path)
    if model is None:
        return
    messages = list(_messages(model))
    message = random.choice(messages)
    try:
        _change_field(message, random.choice(message.DESCRIPTOR.fields), messages, random)
    except (ValueError, TypeError, IndexError):  # a number that the field cannot hold: no change
        return
    (path / MODEL).write_bytes(model.SerializeToString())


def _is_plain(file: Path) -> bool:
    """Whether a file can still be read: an earlier mutation may have put a pipe or a giant in its
    place."""
    return file.is_file() and not file.is_symlink() and file.stat().st_size < 1 << 20


def _parsed(path: Path) -> Any:
    if not _is_plain(path / MODEL):
        return None
    try:
        return Model_pb2.Model.FromString((path / MODEL).read_bytes())
    except Exception:  # an earlier mutation broke it; protobuf raises several kinds of errors
        return None


def _messages(message: Any) -> Iterator[Any]:
    yield message
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        if field.message_type.GetOptions().map_entry:
            inner = [item for item in value.values() if hasattr(item, "ListFields")]
        else:
            inner = list(value) if field.is_repeated else [value]
        for item in inner:
            yield from _messages(item)


def _change_field(message: Any, field: Any, messages: list[Any], random: Random) -> None:
    value = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        _change_map(value, random)
    elif field.is_repeated:
        _change_list(value, field, messages, random)
    elif field.message_type is not None:
        others = [item for item in messages if item.DESCRIPTOR is field.message_type]
        if others and random.random() < 0.7:
            value.CopyFrom(type(value).FromString(random.choice(others).SerializeToString()))
        else:
            message.ClearField(field.name)
    else:
        setattr(message, field.name, _scalar(value, random))


def _change_map(value: Any, random: Random) -> None:
    keys = sorted(value)
    if not keys:
        return
    key, other = random.choice(keys), random.choice([*keys, *TEXTS])
    if hasattr(value[key], "CopyFrom"):
        value[other].CopyFrom(type(value[key]).FromString(value[key].SerializeToString()))
    else:
        value[other] = value[key]
    if random.random() < 0.5 and other != key:
        del value[key]


def _change_list(value: Any, field: Any, messages: list[Any], random: Random) -> None:
    kind = random.randrange(4)
    if field.message_type is not None:
        others = [item for item in messages if item.DESCRIPTOR is field.message_type]
        items = [type(item).FromString(item.SerializeToString()) for item in value]
        if kind == 0 and others:
            items.insert(random.randint(0, len(items)), random.choice(others))
        elif kind == 1 and items:
            del items[random.randrange(len(items))]
        elif kind == 2:
            random.shuffle(items)
        elif items:
            items.append(items[random.randrange(len(items))])
        copies = [type(item).FromString(item.SerializeToString()) for item in items]
        del value[:]
        value.extend(copies)
    elif kind == 0 and len(value):
        value[random.randrange(len(value))] = _scalar(value[0], random)
    elif kind == 1 and len(value):
        del value[random.randrange(len(value))]
    else:
        value.extend([_scalar(value[0] if len(value) else 1, random)] * random.choice([1, 2, 1000]))


def _scalar(old: Any, random: Random) -> Any:
    if isinstance(old, str):
        return random.choice([*TEXTS, old + "_", old[:-1]])
    if isinstance(old, bytes):
        return random.choice([b"", old + b"\0", old[:-1], random.randbytes(random.randint(0, 64))])
    if isinstance(old, float):
        return random.choice([0.0, -1.0, 1e38, float("nan"), float("inf")])
    if isinstance(old, bool):
        return not old
    return random.choice([*NUMBERS, old + 1, old - 1, old * 2])


def _bytes(file: Path) -> Callable[[Path, Random], None]:
    def change(path: Path, random: Random) -> None:
        """Flip, insert, drop or cut bytes."""
        if not _is_plain(path / file):
            return
        data = bytearray((path / file).read_bytes())
        for _ in range(random.choice([1, 1, 2, 8])):
            at = random.randrange(len(data) + 1)
            kind = random.randrange(4)
            if kind == 0 and at < len(data):
                data[at] = random.choice(
                    [0, 1, 127, 128, 255, data[at] ^ (1 << random.randrange(8))]
                )
            elif kind == 1:
                data[at:at] = random.randbytes(random.choice([1, 4, 64]))
            elif kind == 2:
                del data[at : at + random.choice([1, 4, 64])]
            elif random.random() < 0.3:
                del data[at:]
        (path / file).write_bytes(data)

    return change


def _blob_fields(path: Path, random: Random) -> None:
    """Set one field of the header or of a blob's metadata to something else."""
    file = _one_of(path, "*.bin", random)
    if file is None:
        return
    data = bytearray(file.read_bytes())
    slots = [at for at in range(64, len(data) - 63, 64) if data[at : at + 4] == b"\xef\xbe\xad\xde"]
    if not slots or random.random() < 0.1:
        if len(data) >= HEADER.size:
            HEADER.pack_into(data, 0, *(random.choice(NUMBERS) & 0xFFFFFFFF for _ in range(2)))
    else:
        at = random.choice(slots)
        fields = list(METADATA.unpack_from(data, at))
        index = random.randrange(len(fields))
        changed = random.choice(
            [*NUMBERS, *range(20), fields[index] + 1, fields[index] - 1, fields[index] * 2]
        )
        fields[index] = changed & (0xFFFFFFFF if index < 2 else 2**64 - 1)
        METADATA.pack_into(data, at, *fields)
    file.write_bytes(data)


def _one_of(path: Path, pattern: str, random: Random) -> Path | None:
    """A plain file of the package with such a name."""
    files = [file for file in sorted(path.rglob(pattern)) if _is_plain(file)]
    return random.choice(files) if files else None


def _text_tokens(path: Path, random: Random) -> None:
    """Drop, double, move or replace a few tokens of the program's text."""
    file = _one_of(path, "model.mil", random)
    if file is None:
        return
    tokens = re.findall(r'"[^"]*"|->|[\w.+-]+|\s+|.', file.read_bytes().decode(errors="replace"))
    if not tokens:
        return
    at = random.randrange(len(tokens))
    other = random.choice([*TEXT_TOKENS, random.choice(tokens), str(random.choice(NUMBERS))])
    kind = random.randrange(5)
    if kind == 0:
        del tokens[at : at + random.choice([1, 2, 20])]
    elif kind == 1:
        tokens[at:at] = tokens[at : at + random.choice([1, 2, 40])]
    elif kind == 2:
        tokens[at] = other
    elif kind == 3:
        tokens[at:at] = [other] * random.choice([1, 2, 3000])
    else:
        to = random.randrange(len(tokens))
        tokens[at], tokens[to] = tokens[to], tokens[at]
    file.write_text("".join(tokens))


def _text_bytes(path: Path, random: Random) -> None:
    file = _one_of(path, random.choice(["model.mil", "metadata.json", "*.bin"]), random)
    if file is not None:
        _bytes(file.relative_to(path))(path, random)


def _metadata(path: Path, random: Random) -> None:
    """Replace or drop one value somewhere in metadata.json."""
    file = path / "metadata.json"
    if not _is_plain(file):
        return
    try:
        document = json.loads(file.read_bytes())
    except ValueError:
        return
    holders: list[Any] = []
    pending: list[Any] = [document]
    while pending:
        item = pending.pop()
        if isinstance(item, dict | list) and item:
            holders.append(item)
            pending += item.values() if isinstance(item, dict) else item
    if not holders:
        return
    holder = random.choice(holders)
    key = random.choice(sorted(holder) if isinstance(holder, dict) else range(len(holder)))
    if random.random() < 0.3:
        del holder[key]
    else:
        holder[key] = random.choice([*MANIFEST_VALUES, *METADATA_VALUES])
    file.write_text(json.dumps(document))


def _compiled_files(path: Path, random: Random) -> None:
    """Remove a file, or put a folder, a pipe, a link or a sparse giant in its place."""
    file = _one_of(path, "*", random)
    if file is not None:
        _replaced(file, random)


def _manifest(path: Path, random: Random) -> None:
    """Replace or drop one value of Manifest.json."""
    if not _is_plain(path / "Manifest.json"):
        return
    try:
        manifest = json.loads((path / "Manifest.json").read_bytes())
    except ValueError:
        return
    holder: Any = manifest
    while isinstance(holder, dict) and holder:
        key = random.choice(sorted(holder))
        if isinstance(holder[key], dict) and random.random() < 0.8:
            holder = holder[key]
            continue
        if random.random() < 0.2:
            del holder[key]
        else:
            holder[key] = random.choice(MANIFEST_VALUES)
        break
    (path / "Manifest.json").write_text(json.dumps(manifest))


def _files(path: Path, random: Random) -> None:
    """Remove a file, or put a folder, a pipe, a link or a sparse giant in its place."""
    _replaced(path / random.choice([Path("Manifest.json"), MODEL, WEIGHTS]), random)


def _replaced(file: Path, random: Random) -> None:
    kinds: list[Callable[[], Any]] = [
        lambda: None,
        file.mkdir,
        lambda: os.mkfifo(file),
        lambda: file.symlink_to("/dev/zero"),
        lambda: file.symlink_to(file),
        lambda: (file.touch(), os.truncate(file, 1 << 40)),
    ]
    if _is_plain(file):
        file.unlink()
        random.choice(kinds)()


COMPILED_MUTATIONS = [
    *[_text_tokens] * 10,
    *[_text_bytes] * 3,
    *[_metadata] * 3,
    _blob_fields,
    _compiled_files,
]
MUTATIONS = [
    *[_program_fields] * 12,
    *[_bytes(MODEL)] * 2,
    _bytes(WEIGHTS),
    *[_blob_fields] * 2,
    _manifest,
    _files,
]


def damaged_copy(source: Path, target: Path, random: Random) -> Path:
    """A copy of the package `source` at `target` (with the suffix of `source`), which is replaced,
    with random damage."""
    target = target.with_suffix(source.suffix)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    mutate(target, random)
    return target
