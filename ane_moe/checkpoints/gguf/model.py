"""A GGUF model of one file or of several, opened."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ane_moe.checkpoints.gguf.blocks import require_package
from ane_moe.checkpoints.gguf.config import architecture_of, config_of, generation_of
from ane_moe.checkpoints.gguf.header import GgufFile, read_gguf
from ane_moe.checkpoints.gguf.names import native_tensors
from ane_moe.checkpoints.gguf.vocabulary import read_vocabulary
from ane_moe.checkpoints.stored_tensor import StoredTensor
from ane_moe.errors import UserError
from ane_moe.wording import listed

SUFFIX = ".gguf"
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True)
class GgufModel:
    """What a GGUF model is as a checkpoint. `kinds` are ggml's types of its quantised tensors."""

    config: dict[str, Any]
    generation: dict[str, Any]
    tensors: dict[str, StoredTensor]
    kinds: tuple[str, ...]
    notes: tuple[str, ...]


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that `path` is, or the one of the folder `path`, the first of its parts; None
    where there is none, or a model in safetensors form beside it.

    Raises UserError where a folder holds more than one model.
    """
    if path.is_file():
        return path if path.suffix == SUFFIX else None
    files = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else []
    if not files or any(path.glob("*.safetensors")):
        return None
    first = [file for file in files if (part := _part(file)) is None or part[1] == 1]
    if len(first) > 1:
        names = listed([file.name for file in first])
        raise UserError(f"{path} holds more than one GGUF model", names, "give one of the files")
    return (first or files)[0]


def open_gguf(path: Path) -> GgufModel:
    """The model of a file and its further parts; no weights are read. Raises UserError."""
    parts = _parts(path)
    first = parts[0]
    tensors: dict[str, StoredTensor] = {}
    for part in parts:
        if twice := [name for name in part.tensors if name in tensors]:
            raise UserError(f"{part.path} stores tensors of another part", listed(twice))
        tensors |= part.tensors
    known, config = architecture_of(first), config_of(first, tensors)
    kinds = sorted({kind for tensor in tensors.values() if (kind := _kind(tensor))})
    if kinds:
        require_package(", ".join(kinds), str(path))
    vocabulary = read_vocabulary(first.metadata)
    notes = [f"GGUF: {', '.join(kinds)} decoded exactly while it is read" if kinds else "GGUF"]
    if isinstance(vocabulary, str):
        notes.append(f"its tokenizer cannot be rebuilt ({vocabulary}): converted without one")
    native = native_tensors(known, config, tensors)
    return GgufModel(config, generation_of(first), native, tuple(kinds), tuple(notes))


def _kind(tensor: StoredTensor) -> str:
    """The type of a quantised tensor."""
    inner = getattr(tensor.codec, "tensor", None)
    return inner.dtype if isinstance(inner, StoredTensor) else ""


def _part(file: Path) -> tuple[str, int, int] | None:
    """Name, number and count of a part."""
    found = PART.fullmatch(file.name)
    return (found[1], int(found[2]), int(found[3])) if found else None


def _parts(path: Path) -> list[GgufFile]:
    named = _part(path)
    if named is None:
        whole = read_gguf(path)
        if whole.metadata.get("split.count", 0) not in (0, 1):
            do = "give its parts the names that they had: NAME-00001-of-00003.gguf"
            raise UserError(f"{path} is a part of a model", "a name that does not tell", do)
        return [whole]
    name, _, count = named
    files = [path.with_name(f"{name}-{n:05}-of-{count:05}.gguf") for n in range(1, count + 1)]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise UserError(f"{path} is a part of a model", f"no {listed(missing)}", "download them")
    parts = [read_gguf(file) for file in files]
    for number, part in enumerate(parts):
        told = tuple(part.metadata.get(f"split.{field}") for field in ("no", "count"))
        if told != (number, count):
            found = f"part {told[0]} of {told[1]} by its metadata, counted from 0"
            raise UserError(f"{part.path} is not the part that its name tells", found)
    total, stored = parts[0].metadata.get("split.tensors.count"), sum(len(p.tensors) for p in parts)
    if total is not None and total != stored:
        raise UserError(f"{path}: tensors of a part are missing", f"{stored} of {total}")
    return parts
