"""A GGUF model of one file or of several, opened."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ane_moe.checkpoints.gguf.blocks import require_package
from ane_moe.checkpoints.gguf.config import architecture_of, config_of, generation_of
from ane_moe.checkpoints.gguf.header import GgufFile, read_gguf
from ane_moe.checkpoints.gguf.names import native_tensors
from ane_moe.checkpoints.gguf.vocabulary import read_vocabulary
from ane_moe.checkpoints.stored_tensor import StoredTensor
from ane_moe.checkpoints.weight_file import WeightFile
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
    first = first_parts([file.name for file in files])
    if len(first) > 1:
        do = "give one of the files"
        raise UserError(f"{path} holds more than one GGUF model", listed(first), do)
    return path / first[0] if first else files[0]


def first_parts(names: Iterable[str]) -> list[str]:
    """Of the names of files, those of GGUF models of one file, and of the first of several."""
    found = [name for name in names if name.endswith(SUFFIX)]
    return [name for name in found if (part := _part(name)) is None or part[1] == 1]


def part_names(given: str) -> list[str]:
    """The names of all parts of the model of which a file of this name is one; none of a whole."""
    if (named := _part(given)) is None:
        return []
    name, _, count = named
    return [f"{name}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]


def open_gguf(path: Path, placed: Callable[[Path], WeightFile] = lambda file: file) -> GgufModel:
    """The model of a file and its further parts; no weights are read, which are to be read where a
    file is `placed`. Raises UserError."""
    parts = _parts(path, placed)
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


def _part(file: str) -> tuple[str, int, int] | None:
    """Name, number and count of a part."""
    found = PART.fullmatch(file)
    return (found[1], int(found[2]), int(found[3])) if found else None


def _parts(path: Path, placed: Callable[[Path], WeightFile]) -> list[GgufFile]:
    files = [path.with_name(name) for name in part_names(path.name)]
    if _part(path.name) is None:
        whole = read_gguf(path, placed(path))
        if whole.metadata.get("split.count", 0) not in (0, 1):
            do = "give its parts the names that they had: NAME-00001-of-00003.gguf"
            raise UserError(f"{path} is a part of a model", "a name that does not tell", do)
        return [whole]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise UserError(f"{path} is a part of a model", f"no {listed(missing)}", "download them")
    parts = [read_gguf(file, placed(file)) for file in files]
    for number, part in enumerate(parts):
        told = tuple(part.metadata.get(f"split.{field}") for field in ("no", "count"))
        if told != (number, len(files)):
            found = f"part {told[0]} of {told[1]} by its metadata, counted from 0"
            raise UserError(f"{part.path} is not the part that its name tells", found)
    total, stored = parts[0].metadata.get("split.tensors.count"), sum(len(p.tensors) for p in parts)
    if total is not None and total != stored:
        raise UserError(f"{path}: tensors of a part are missing", f"{stored} of {total}")
    return parts
