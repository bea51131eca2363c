"""What runtime_meta.json may say of files and experts: a conversion of somebody else's is not
trusted to say nothing else."""

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from ane_moe.errors import UserError

SHA256 = re.compile(r"[0-9a-f]{64}")
LONGEST_NAME, LONGEST_PATH = 255, 1024  # bytes, of a part and of all: what file systems take
GOLDENS = ("golden", "golden_as_stored")
SINGLE = (*GOLDENS, "embed", "tokenizer_record", "early")  # fields that name a file, or none


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_index(value: Any) -> bool:
    return type(value) is int and value >= 0


# What is said of a layer's experts, if it is; the first two always are.
OF_EXPERTS: dict[str, Callable[[Any], bool]] = {
    "experts": _is_count,
    "k": _is_count,
    "idle": _is_count,
    "guesses": _is_index,
    "router": lambda value: isinstance(value, str),
    "ranking": lambda value: isinstance(value, Mapping),  # parse_ranking looks into it
}
ALWAYS = {"experts", "k"}


def require_sound(data: Mapping[str, Any], shard_paths: Iterable[Any], manifest: Path) -> None:
    """Raise UserError where a file that the manifest names is outside its folder, and ValueError
    for facts of another form."""
    files, experts = data.get("files", {}), data.get("moe", {})
    adapters = data.get("adapters", {})
    for name, facts in {"files": files, "moe": experts, "adapters": adapters}.items():
        _require(isinstance(facts, Mapping), name, facts)
    for layer, facts in experts.items():
        _require(layer.isdecimal() and _is_of_experts(facts), f"moe[{layer}]", facts)
    for name, facts in adapters.items():
        _require(isinstance(facts, Mapping), f"adapters[{name}]", facts)
    for name, digest in files.items():
        sound = isinstance(digest, str) and SHA256.fullmatch(digest)
        _require(bool(sound), f"files[{name[:LONGEST_NAME]}]", digest)
    named = chain(
        shard_paths,
        files,
        data.get("tokenizer", ()),
        (data.get(name) for name in SINGLE),
        (facts.get(name) for facts in adapters.values() for name in GOLDENS),
        (facts.get("router") for facts in experts.values()),
    )
    for path in named:
        if path is not None:
            _require_inside(path, manifest)
    above = {str(folder) for name in files for folder in PurePosixPath(name).parents}
    both = sorted(above & {*files})
    _require(not both, "files", f"{both[:1]}, a file and a folder")


def _is_of_experts(facts: Any) -> bool:
    return (
        isinstance(facts, Mapping)
        and facts.keys() >= ALWAYS
        and all(name in OF_EXPERTS and OF_EXPERTS[name](one) for name, one in facts.items())
    )


def _require(sound: bool, name: str, value: Any) -> None:
    if not sound:
        raise ValueError(f"{name} is {str(value)[:LONGEST_NAME]!r}")


def _require_inside(relative: Any, manifest: Path) -> None:
    _require(isinstance(relative, str), "the name of a file", relative)
    path = PurePosixPath(relative)
    if path.is_absolute() or ".." in path.parts or not path.parts or {*relative} & {"\\", "\0"}:
        raise UserError(
            f"{manifest} names a file outside its folder",
            repr(relative),
            "do not trust this conversion",
        )
    parts = [len(part.encode()) for part in path.parts]  # ValueError for half a character
    fits = max(parts) <= LONGEST_NAME and sum(parts) + len(parts) <= LONGEST_PATH
    _require(fits and str(path) == relative, "the name of a file", relative)
