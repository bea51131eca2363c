"""One shard's part of a conversion, as a worker does it: stamp it, or find it finished.

In a process that imports neither torch nor coremltools, unless a weight format needs torch.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ane_moe.checkpoints.checkpoint import Checkpoint, TensorSource
from ane_moe.conversion.early import EarlyRows, ShiftedLogits
from ane_moe.conversion.job import Job
from ane_moe.conversion.plan import OneHot, Recovery, ShardPlan, tensors_of
from ane_moe.conversion.remote_output import Destination, destination
from ane_moe.conversion.shard_form import ShardForm, form_of
from ane_moe.conversion.side_files import write_embedding
from ane_moe.conversion.workers import peak_memory_bytes, this_process
from ane_moe.emit.coreml.package import ContentKey, Weight
from ane_moe.emit.coreml.template import Template
from ane_moe.errors import UserError
from ane_moe.files import disk_error, sha256, temporary_folder
from ane_moe.formats.as_stored import AsStored, Codes
from ane_moe.formats.calibration import Moments
from ane_moe.formats.encoded import Encoded
from ane_moe.formats.recipe import Choice, find_format
from ane_moe.model.port import Shape
from ane_moe.remote_folder import SentFile, at_hand

if TYPE_CHECKING:  # it imports torch
    from ane_moe.formats.low_rank import LowRank

NOTHING = np.empty((0, 0), np.float16)
ENCODING = 4  # counts up when a weight format comes to give other bytes


@dataclass(frozen=True)
class Done:
    """What a worker reports of one shard."""

    path: str
    content_key: str
    weight_bytes: int
    reused: bool
    files: dict[str, str]
    peak_memory_bytes: int
    process: str


@dataclass(frozen=True)
class ShardJob:
    """One shard's part of a job, complete in itself: `checkpoint` holds no tensors but the
    shard's. It is written into `out`, or sent to an address."""

    checkpoint: Checkpoint
    out: Path
    shard: ShardPlan
    calibration: Path | SentFile | None
    sent_to: Destination | None = None

    @property
    def name(self) -> str:
        """What it is called where a worker's trouble with it is told."""
        return self.shard.path


def shard_job(job: Job, shard: ShardPlan) -> ShardJob:
    """What a worker needs to know of the job to make one shard."""
    keys = {tensor.key for source in shard.sources.values() for tensor in tensors_of(source)}
    calibration = job.sent or job.calibration
    return ShardJob(job.checkpoint.holding(keys), job.out, shard, calibration, destination(job))


@contextmanager
def _in_scratch(job: ShardJob) -> Iterator[ShardJob]:
    """The job with a folder of this machine alone to write into, and the calibration at hand."""
    with (
        temporary_folder() as scratch,
        at_hand(job.calibration) if job.calibration else nullcontext() as calibration,
    ):
        yield replace(job, out=scratch, calibration=calibration, sent_to=None)


def reuse_shard(job: ShardJob) -> Done | None:
    """The shard as it lies there, if its content key is the one it would get."""
    if job.sent_to is None:
        return _reused(job)
    folder = job.sent_to.folder
    with _in_scratch(job) as here:
        for name in folder.sizes(job.shard.path):
            folder.fetch(name, here.out / name)
        return _reused(here)


def _reused(job: ShardJob) -> Done | None:
    form, path = form_of(job.shard), job.out / job.shard.path
    key = form.key_at(path)
    if key is None or key != _expected_key(job):
        return None
    digests = form.digests_at(path)
    return None if digests is None else _report(job, key, digests, reused=True)


def stamp_shard(job: ShardJob, templates: dict[str, Template]) -> Done:
    """Write a shard, and send it where it goes."""
    if job.sent_to is None:
        return _stamped(job, templates)
    with _in_scratch(job) as here:
        done = _stamped(here, templates)
        last = f"{done.path}/{form_of(job.shard).parts[-1]}".rstrip("/")
        job.sent_to.send(here.out, done.files, last)
        return done


def _stamped(job: ShardJob, templates: dict[str, Template]) -> Done:
    key, path = _key(job), job.out / job.shard.path
    path.parent.mkdir(parents=True, exist_ok=True)
    written = form_of(job.shard).write(templates, _values(job, key), key, path)
    return _report(job, written.content_key, written.files, reused=False)


def _report(job: ShardJob, content_key: str, files: dict[str, str], reused: bool) -> Done:
    """`files` are digests by path inside the shard; of a single file by ""."""
    shard, peak = job.shard, peak_memory_bytes()
    named = {f"{shard.path}/{name}".rstrip("/"): digest for name, digest in files.items()}
    return Done(shard.path, content_key, shard.weight_bytes, reused, named, peak, this_process())


def _calibration(job: ShardJob) -> Path | None:
    assert not isinstance(job.calibration, SentFile)  # one that is sent is at hand in a scratch
    return job.calibration


def _key(job: ShardJob) -> ContentKey:
    shard, calibration = job.shard, _calibration(job)
    seen = sha256(calibration) if calibration and shard.choices else None
    choices = sorted((name, choice.format, choice.rank) for name, choice in shard.choices.items())
    form = form_of(shard)
    return ContentKey(form.made_of, choices, seen, ENCODING, tool_versions(form))


def tool_versions(*forms: ShardForm) -> dict[str, str]:
    """Versions of what decides the bytes of such shards, by package."""
    return {name: version(name) for form in forms for name in form.tools}


def _expected_key(job: ShardJob) -> str:
    """The content key the shard would get: reads the weights, writes nothing."""
    key = _key(job)
    for name, source in job.shard.sources.items():
        if name in job.shard.shared:
            continue
        if not isinstance(source, TensorSource):
            source.feed(key)
        for tensor in tensors_of(source):
            job.checkpoint.feed(tensor, key)
    return key.digest()


def _values(job: ShardJob, key: ContentKey) -> Iterator[tuple[str, Weight]]:
    """Each weight of the shard, valid until the next one of its shape: fresh memory costs more than
    the reading."""
    shard, calibration = job.shard, _calibration(job)
    moments = Moments(calibration) if calibration else None
    buffers: dict[Shape, np.ndarray] = {}
    ranks = {
        other.source: other.rank for other in shard.sources.values() if isinstance(other, Recovery)
    }
    apart: dict[TensorSource, LowRank] = {}  # directions of a weight come after it
    for name, source in shard.sources.items():
        if name in shard.shared:
            continue
        if not isinstance(source, TensorSource):
            source.feed(key)
        if isinstance(source, OneHot):
            yield name, np.eye(source.rows, source.columns, source.first, dtype=np.float16)
        elif isinstance(source, EarlyRows | ShiftedLogits):
            yield name, source.value(job.checkpoint, key)
        elif isinstance(source, Recovery):
            yield name, _thin(source, apart.get(source.source))
        else:
            buffer = buffers.setdefault(source.shape, np.empty(source.shape, np.float16))
            weight, choice = (
                job.checkpoint.read(source, out=buffer, hasher=key),
                shard.choices.get(name, Choice()),
            )
            form, m = find_format(choice.format), None
            if isinstance(form, AsStored):
                yield name, _carried(job.checkpoint, source, form, weight)
                continue
            if moments and choice != Choice():
                m = moments.find(source.reads, source.shape[1])
            if rank := ranks.get(source, 0):
                from ane_moe.formats.low_rank import split_directions  # torch

                split = split_directions(weight, rank, m)
                weight, apart[source] = split.remainder, replace(split, remainder=NOTHING)
            yield name, form.encode(weight, m) or weight


def _thin(source: Recovery, apart: "LowRank | None") -> np.ndarray:
    """Directions kept apart from a weight, then those that an adapter adds; fp16."""
    into = source.side == "in"
    thin = np.zeros(source.shape, np.float16)
    by_direction = thin if into else thin.T
    if apart is not None:
        by_direction[: source.rank] = apart.into if into else apart.out.T
    if source.added is not None:
        out, inside = source.added.stored(source.source.scale)
        out = out if source.rows is None else out[slice(*source.rows)]
        by_direction[source.rank : source.rank + source.added.rank] = inside if into else out.T
    return thin


def _carried(
    checkpoint: Checkpoint, source: TensorSource, form: AsStored, weight: np.ndarray
) -> Encoded:
    codec = checkpoint.tensors[source.key].codec
    assert codec is not None and codec.pieces is not None
    try:
        return form.carry(
            weight, Codes(values=codec.pieces.values, **checkpoint.taken_apart(source))
        )
    except UserError as error:
        raise UserError(
            f"{source.key} ({source.name}): {error.what}", error.found, error.do
        ) from None


def stamp_embedding(
    checkpoint: Checkpoint,
    source: TensorSource,
    path: Path,
    form: str,
    sent_to: Destination | None = None,
) -> Done:
    """Write the embedding table to `path`, or send it by its name."""
    if sent_to is not None:
        with temporary_folder() as scratch:
            done = stamp_embedding(checkpoint, source, scratch / path.name, form)
            sent_to.send(scratch, done.files, done.path)
            return done
    key = ContentKey(form, ENCODING)
    try:
        files = {path.name: write_embedding(checkpoint, source, path, form, key, this_process())}
    except OSError as error:
        raise disk_error(error, path) from error
    size, peak = path.stat().st_size, peak_memory_bytes()
    return Done(path.name, key.digest(), size, False, files, peak, this_process())
