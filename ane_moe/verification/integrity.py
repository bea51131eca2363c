"""Files before numbers: is everything the manifest names there, unchanged, readable and finite, and
nothing else?"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ane_moe.errors import UserError
from ane_moe.files import is_hidden, sha256
from ane_moe.loop.embedding_table import Int8Table, open_embeddings
from ane_moe.loop.shards import check_manifest
from ane_moe.manifest import Manifest
from ane_moe.mlprogram.program import Block, Constant, Program
from ane_moe.mlprogram.reader import read_program
from ane_moe.progress import Progress
from ane_moe.verification.result import Problem

FLOATS = {"fp16", "fp32", "fp64", "bf16"}
CHUNK = 1 << 22  # elements looked at, or bytes hashed, at a time


def check_integrity(folder: Path, manifest: Manifest, progress: Progress) -> tuple[Problem, ...]:
    """Everything wrong with the files of a conversion, most basic first; empty when it is sound.

    Packages whose files are missing or changed are not opened.
    """
    problems = [*_incomplete(folder, manifest), *_unlisted(folder, manifest)]
    for number, (relative, digest) in enumerate(sorted(manifest.files.items())):
        progress(f"checking {relative}", number, len(manifest.files))
        problems += _changed(folder, relative, digest)
    suspect = {problem.path for problem in problems}
    for shard in manifest.shards:
        if not any(path == shard.path or path.startswith(shard.path + "/") for path in suspect):
            problems += _unsound(folder, shard.path)
    if manifest.embed not in suspect:
        problems += _bad_table(folder, manifest)
    return tuple(problems)


def _incomplete(folder: Path, manifest: Manifest) -> Iterator[Problem]:
    """Shards that the manifest itself lacks, or names without listing their files."""
    try:
        check_manifest(manifest, folder)
    except UserError as error:
        yield Problem("runtime_meta.json", str(error))
    for shard in manifest.shards:
        if not any(relative.startswith(shard.path + "/") for relative in manifest.files):
            yield Problem(shard.path, "named as a shard, but no file of it is listed")


def _unlisted(folder: Path, manifest: Manifest) -> Iterator[Problem]:
    """Files inside the shard folders that the manifest does not know; files of others beside them
    are not ours."""
    for top in sorted({shard.path.split("/")[0] for shard in manifest.shards}):
        for path in sorted((folder / top).rglob("*")):
            relative = path.relative_to(folder).as_posix()
            if not path.is_dir() and not is_hidden(path) and relative not in manifest.files:
                yield Problem(relative, "not listed in runtime_meta.json: an extra shard or file")


def _changed(folder: Path, relative: str, digest: str) -> Iterator[Problem]:
    path = folder / relative
    if not path.is_file():
        yield Problem(relative, "missing")
    elif sha256(path) != digest:
        yield Problem(
            relative, "changed since the conversion: its sha256 differs from runtime_meta.json"
        )


def _unsound(folder: Path, relative: str) -> Iterator[Problem]:
    try:
        for name in _not_finite(read_program(folder / relative)):
            yield Problem(relative, f"NaN or Inf in weight {name}")
    except UserError as error:
        yield Problem(relative, str(error))


def _not_finite(program: Program) -> Iterator[str]:
    """Names of weights with a NaN or an Inf; those that functions share are read once.

    Weights live in the blob file. An Inf inside the graph itself is the open end of a `clip`.
    """
    seen = set()
    for function in program.functions.values():
        for name, constant in _constants(function.block):
            if (
                constant.blob is None
                or constant.blob in seen
                or getattr(constant.type, "dtype", "") not in FLOATS
            ):
                continue
            seen.add(constant.blob)
            values = constant.load()
            if isinstance(values, np.ndarray) and not _finite(values):
                yield name


def _constants(block: Block) -> Iterator[tuple[str, Constant]]:
    for operation in block.operations:
        for value in operation.attributes.values():
            yield operation.name, value
        for name, arguments in operation.inputs.items():
            yield from (
                (f"{operation.name}.{name}", value)
                for value in arguments
                if isinstance(value, Constant)
            )
        for inner in operation.blocks:
            yield from _constants(inner)


def _finite(values: np.ndarray) -> bool:
    flat = values.reshape(-1)
    return all(
        bool(np.isfinite(flat[first : first + CHUNK]).all()) for first in range(0, flat.size, CHUNK)
    )


def _bad_table(folder: Path, manifest: Manifest) -> Iterator[Problem]:
    try:
        table = open_embeddings(folder, manifest)
        if not _finite(table.scales if isinstance(table, Int8Table) else table):
            yield Problem(manifest.embed, "NaN or Inf in the embedding table")
    except UserError as error:
        yield Problem(manifest.embed, str(error))
