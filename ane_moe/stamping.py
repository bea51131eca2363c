"""One shard's part of a conversion, as a worker does it: trace, stamp, or find it finished."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from ane_moe.blocks.ports import Shape
from ane_moe.blocks.registry import TemplateKey
from ane_moe.checkpoint import Checkpoint, TensorSource, open_checkpoint
from ane_moe.compress.calibration import Moments
from ane_moe.compress.low_rank import LowRank, split_directions
from ane_moe.compress.recipe import Choice, find_format
from ane_moe.package import ContentKey, Weight, file_hashes, read_content_key, sha256, stamp
from ane_moe.plan import OneHot, Recovery, ShardPlan
from ane_moe.side_files import write_embedding
from ane_moe.trace import Template, make_template
from ane_moe.workers import peak_memory_bytes

TOOLS = ("ane-moe", "coremltools", "torch")
ENCODING = 2        # counts up when a weight format comes to give other bytes


@dataclass(frozen=True)
class Done:
    """What a worker reports of one shard."""

    path: str
    content_key: str
    weight_bytes: int
    reused: bool
    files: dict[str, str]
    peak_memory_bytes: int
    process: int


def trace_template(key: TemplateKey) -> tuple[TemplateKey, Template]:
    return key, make_template(key)


def reuse_shard(checkpoint: Path, out: Path, shard: ShardPlan, calibration: Path | None) -> Done | None:
    """The shard as it lies on disk, if its content key is the one it would get."""
    key = read_content_key(out / shard.path)
    if key is None or key != _expected_key(open_checkpoint(checkpoint), shard, calibration):
        return None
    return _report(out, shard, key, reused=True)


def stamp_shard(
    checkpoint: Path, out: Path, shard: ShardPlan, templates: dict[str, Template], calibration: Path | None
) -> Done:
    key, path = _key(shard, calibration), out / shard.path
    path.parent.mkdir(parents=True, exist_ok=True)
    moments = Moments(calibration) if calibration else None
    written = stamp(templates, _values(open_checkpoint(checkpoint), shard, key, moments), key, path)
    return _report(out, shard, written.content_key, reused=False)


def _report(out: Path, shard: ShardPlan, content_key: str, reused: bool) -> Done:
    files = {f"{shard.path}/{name}": digest for name, digest in file_hashes(out / shard.path).items()}
    return Done(shard.path, content_key, shard.weight_bytes, reused, files, peak_memory_bytes(), os.getpid())


def _key(shard: ShardPlan, calibration: Path | None) -> ContentKey:
    seen = sha256(calibration) if calibration and shard.choices else None
    choices = sorted((name, choice.format, choice.rank) for name, choice in shard.choices.items())
    return ContentKey(shard.graphs, choices, seen, ENCODING, {name: version(name) for name in TOOLS})


def _expected_key(checkpoint: Checkpoint, shard: ShardPlan, calibration: Path | None) -> str:
    """The content key the shard would get: reads the weights, writes nothing."""
    key = _key(shard, calibration)
    for source in shard.weights.values():
        if isinstance(source, TensorSource):
            checkpoint.feed(source, key)
        else:
            key.update(repr(source).encode())
    return key.digest()


def _values(
    checkpoint: Checkpoint, shard: ShardPlan, key: ContentKey, moments: Moments | None
) -> Iterator[tuple[str, Weight]]:
    """Each weight of the shard, valid until the next one of its shape: fresh memory costs more than the reading."""
    buffers: dict[Shape, np.ndarray] = {}
    ranks = {other.source: other.rank for other in shard.weights.values() if isinstance(other, Recovery)}
    apart: dict[TensorSource, LowRank] = {}             # directions of a weight come after it
    for name, source in shard.weights.items():
        if not isinstance(source, TensorSource):
            key.update(repr(source).encode())
        if isinstance(source, OneHot):
            yield name, np.eye(source.rows, source.columns, source.first, dtype=np.float16)
        elif isinstance(source, Recovery):
            yield name, apart[source.source].into if source.side == "in" else apart.pop(source.source).out
        else:
            buffer = buffers.setdefault(source.shape, np.empty(source.shape, np.float16))
            weight, choice = checkpoint.read(source, out=buffer, hasher=key), shard.choices.get(name, Choice())
            form, m = find_format(choice.format), None
            if moments and choice != Choice():
                m = moments.find(source.name, source.shape[1])
            if rank := ranks.get(source, 0):
                apart[source] = split_directions(weight, rank, m)
                weight = apart[source].remainder
            yield name, form.encode(weight, m) or weight


def stamp_embedding(checkpoint: Path, source: TensorSource, path: Path, form: str) -> Done:
    key = ContentKey(form, ENCODING)
    write_embedding(open_checkpoint(checkpoint), source, path, form, key)
    files = {path.name: sha256(path)}
    size, peak = path.stat().st_size, peak_memory_bytes()
    return Done(path.name, key.digest(), size, False, files, peak, os.getpid())
