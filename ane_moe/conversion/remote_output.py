"""A conversion into an address: small files are made in a scratch folder here, shards in one of
whoever makes them, and what is finished is put there, the manifest last."""

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from ane_moe.addresses import address
from ane_moe.conversion.job import Job
from ane_moe.conversion.output_folder import (
    MARKER,
    is_beside,
    of_another,
    of_something_else,
    strangers,
)
from ane_moe.conversion.plan import GOLDEN_FILES
from ane_moe.files import sha256, temporary_folder
from ane_moe.formats.calibration import FILE_NAME as CALIBRATION
from ane_moe.manifest import FILE_NAME, Manifest
from ane_moe.remote_folder import RemoteFolder, SentFile

KEPT = (GOLDEN_FILES, CALIBRATION)  # of an earlier run, to be looked at here


@dataclass(frozen=True)
class Destination:
    """An address, as long as it says there by `marker` that it is this conversion's."""

    folder: RemoteFolder
    marker: str

    def require_ours(self) -> None:
        """Raise UserError where another conversion has begun to write there meanwhile, or ended."""
        found = self.folder.read(MARKER)
        if found is None:  # an equal run may have come to its end
            with suppress(ValueError, LookupError, TypeError):  # whatever lies there
                source = json.loads(self.folder.read(FILE_NAME) or b"")["source"]
                found = json.dumps(source, sort_keys=True).encode() + b"\n"
        if found != self.marker.encode():
            raise of_another(self.folder)

    def send(self, folder: Path, files: Collection[str], last: str) -> None:
        """Put `files` of a folder there that are one thing; the `last` tells which."""
        self.require_ours()
        self.folder.replace_group(folder, [*sorted({*files} - {last}), last])


@contextmanager
def with_scratch(job: Job) -> Iterator[Job]:
    """The job; one whose folder is an address has a scratch folder in its place, with what an
    earlier run of it left there. Raises UserError."""
    url = address(job.out)
    if url is None:
        yield job
        return
    away = RemoteFolder(url)
    with temporary_folder() as here:
        there = away.sizes()
        told = [name for name in (MARKER, FILE_NAME) if name in there]
        if there and not told:
            raise of_something_else(url)
        for name in (*told, *(name for name in there if is_beside(name, KEPT))):
            away.fetch(name, here / name)
        yield replace(job, out=here, away=away)


def announce(job: Job) -> None:
    """Say at the job's address what is being written there."""
    if job.away:
        job.away.write(MARKER, (job.out / MARKER).read_text())
        job.away.remove(FILE_NAME)


def destination(job: Job) -> Destination | None:
    """Where whoever makes shards sends them."""
    return Destination(job.away, (job.out / MARKER).read_text()) if job.away else None


def present(job: Job) -> set[str]:
    """The paths of what lies at the job's address: files, and the folders above them."""
    if job.away is None:
        return {shard.path for shard in job.plan.shards if (job.out / shard.path).exists()}
    names = [PurePosixPath(name) for name in job.away.sizes()]
    return {str(path) for name in names for path in (name, *name.parents)}


def with_sent_calibration(job: Job) -> Job:
    """The job, with its calibration where whoever makes shards finds it."""
    path = job.calibration
    if job.away is None or path is None:
        return job
    job.away.send(path, path.name)
    return replace(job, sent=SentFile(job.away, path.name, sha256(path)))


def fetch_shards(job: Job, manifest: Manifest) -> None:
    """Bring here what the golden of compressed weights is made of."""
    if job.away and manifest.compressed:
        job.away.require_room(manifest.files, job.out)
        job.away.fetch_checked(manifest.files, job.out)


def deliver(job: Job, manifest: Manifest, sent: Collection[str]) -> None:
    """Put there what has not been `sent` yet, then the manifest, which `job.out` has; what it does
    not name goes. Raises UserError where it is another conversion's by now."""
    if (to := destination(job)) is None:
        return
    to.require_ours()
    away = to.folder
    for name in sorted(manifest.files.keys() - set(sent)):
        away.send(job.out / name, name)
    for name in strangers(away.sizes(), manifest.files):
        away.remove(name)
    away.send(job.out / FILE_NAME, FILE_NAME)
    away.remove(MARKER)
