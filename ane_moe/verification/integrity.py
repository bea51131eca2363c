"""Files before numbers: is everything the manifest names there, unchanged, readable and finite, and
nothing else?"""

import os
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from ane_moe.emit.coreai.asset import read_weights
from ane_moe.errors import UserError
from ane_moe.expert_record import PLAIN
from ane_moe.files import is_hidden, sha256
from ane_moe.formats.encoded import Encoded
from ane_moe.loop.embedding_table import Int8Table, NoTable, open_embeddings
from ane_moe.loop.expert_store import StoreFile
from ane_moe.loop.shards import check_manifest
from ane_moe.manifest import Manifest, Shard
from ane_moe.mlprogram.program import Block, Constant, Program
from ane_moe.mlprogram.reader import read_program
from ane_moe.package_form import ASSET, PACKAGE
from ane_moe.progress import Progress
from ane_moe.runtime.coreai.runtime import check_asset
from ane_moe.verification.result import Problem

FLOATS = {"fp16", "fp32", "fp64", "bf16"}
CHUNK = 1 << 22  # elements looked at, or bytes hashed, at a time


def check_integrity(
    folder: Path,
    manifest: Manifest,
    progress: Progress,
    shards: Collection[Shard] | None = None,
) -> tuple[Problem, ...]:
    """Everything wrong with the files of a conversion, most basic first; empty when it is sound.

    Packages whose files are missing or changed are not opened. Of packages other than those of
    `shards` (None: all) it is only asked whether their files are there.
    """
    problems = [*_incomplete(folder, manifest), *_unlisted(folder, manifest)]
    looked_at = manifest.shards if shards is None else shards
    passed_over = {shard.path for shard in manifest.shards} - {shard.path for shard in looked_at}
    files = {
        relative: None if _package(relative) in passed_over else digest
        for relative, digest in sorted(manifest.files.items())
    }
    threads = ThreadPoolExecutor(os.cpu_count())  # hashing frees the interpreter's lock
    try:
        changed = threads.map(partial(_changed, folder), files, files.values())
        for number, (relative, found) in enumerate(zip(files, changed, strict=True)):
            progress(f"checking {relative}", number, len(files))
            problems += found
        suspect = {_package(problem.path) for problem in problems}
        sound = [shard for shard in looked_at if shard.path not in suspect]
        for found in threads.map(partial(_unsound, folder), sound):
            problems += found
    finally:
        threads.shutdown(cancel_futures=True)
    if manifest.embed is not None and manifest.embed not in suspect:
        problems += _bad_table(folder, manifest, manifest.embed)
    return tuple(problems)


def _package(relative: str) -> str:
    """The package that a file is of, or the file."""
    parts = PurePosixPath(relative).parts
    ends = [number for number, part in enumerate(parts, 1) if part.endswith((PACKAGE, ASSET))]
    return "/".join(parts[: ends[0]]) if ends else relative


def _incomplete(folder: Path, manifest: Manifest) -> Iterator[Problem]:
    """Shards that the manifest itself lacks, or names without listing their files."""
    try:
        check_manifest(manifest, folder)
    except UserError as error:
        yield Problem("runtime_meta.json", str(error))
    for shard in manifest.shards:
        listed = shard.store is not None and shard.path in manifest.files
        if not listed and not any(name.startswith(f"{shard.path}/") for name in manifest.files):
            yield Problem(shard.path, "named as a shard, but no file of it is listed")


def _unlisted(folder: Path, manifest: Manifest) -> Iterator[Problem]:
    """Files inside the shard folders that the manifest does not know; files of others beside them
    are not ours."""
    for top in sorted({shard.path.split("/")[0] for shard in manifest.shards}):
        for path in sorted((folder / top).rglob("*")):
            relative = path.relative_to(folder).as_posix()
            if not path.is_dir() and not is_hidden(path) and relative not in manifest.files:
                yield Problem(relative, "not listed in runtime_meta.json: an extra shard or file")


def _changed(folder: Path, relative: str, digest: str | None) -> list[Problem]:
    """What is wrong with a file; without a `digest` only that it is missing."""
    path = folder / relative
    if not path.is_file():
        return [Problem(relative, "missing")]
    if digest is None or sha256(path) == digest:
        return []
    what = "changed since the conversion: its sha256 differs from runtime_meta.json"
    return [Problem(relative, what)]


def _unsound(folder: Path, shard: Shard) -> list[Problem]:
    path = folder / shard.path
    try:
        if shard.store is not None:
            names = list(_not_finite_stored(StoreFile(path, shard.store, shard.content_key)))
        elif path.suffix == ASSET:
            names = list(_not_finite_asset(path))
        else:
            names = list(_not_finite(read_program(path)))
    except UserError as error:
        return [Problem(shard.path, str(error))]
    return [Problem(shard.path, f"NaN or Inf in weight {name}") for name in names]


def _not_finite_stored(file: StoreFile) -> Iterator[str]:
    """Names of experts' weights with a NaN or an Inf, in the numbers that are stored as such."""
    record = np.empty(file.store.record.size, np.uint8)
    for expert in range(file.store.count):
        file.read(expert, record)
        for weight in file.store.record.weights:
            halves = (array for array in weight.arrays if array.type == PLAIN)
            if not all(_finite(record[array.bytes].view(np.float16)) for array in halves):
                yield f"{weight.name} of expert {expert}"


def _not_finite_asset(path: Path) -> Iterator[str]:
    """As `_not_finite`, of one of Core AI's assets."""
    check_asset(path)
    for name, weight in read_weights(path):
        arrays = weight.arrays if isinstance(weight, Encoded) else ({"": weight},)
        halves = (one for held in arrays for one in held.values() if one.dtype == np.float16)
        if not all(map(_finite, halves)):
            yield name


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


def _bad_table(folder: Path, manifest: Manifest, embed: str) -> Iterator[Problem]:
    try:
        table = open_embeddings(folder, manifest)
        assert not isinstance(table, NoTable)
        if not _finite(table.scales if isinstance(table, Int8Table) else table):
            yield Problem(embed, "NaN or Inf in the embedding table")
    except UserError as error:
        yield Problem(embed, str(error))
