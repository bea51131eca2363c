"""Conversions to the Hugging Face Hub: in batches, each a commit, the manifest in the last one, so
that its presence means there what it means on disk. What is there already is not sent again."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ane_moe.hub.asking import asking, repository
from ane_moe.hub.digests import check_digests
from ane_moe.hub.pulled import CARD
from ane_moe.manifest import FILE_NAME, read_manifest
from ane_moe.progress import Progress, silent

BATCH_FILES, BATCH_BYTES = 200, 4 << 30  # of a commit: what a break of the line costs at most
DO = "check the network and `hf auth login`; the same command goes on where it was"


@dataclass(frozen=True)
class Pushed:
    """What a push did: files and bytes that were sent, files that were there, the last commit's
    address."""

    repository: str
    url: str
    sent: int
    sent_bytes: int
    kept: int


def push(
    out: Path, text: str, card: str, *, private: bool = False, progress: Progress = silent
) -> Pushed:
    """Send the conversion in `out`, with `card` as its README.md, to a repository that is made
    where there is none. A push that broke off goes on.

    Raises UserError for a folder that is no finished conversion, for a file that is not what the
    manifest names, and where the Hub does not take it.
    """
    import huggingface_hub as hub

    name, manifest = repository(text), read_manifest(out)
    check_digests(out, manifest, progress)
    api = hub.HfApi()
    with asking(f"{out} cannot be sent to {name} on the Hugging Face Hub", DO):
        api.create_repo(name.repository, private=private or None, exist_ok=True)
        there = _remote(api, name.repository, name.revision)
        missing = [
            file
            for file, digest in sorted(manifest.files.items())
            if there.get(file) not in (digest, _blob_id(out / file))
        ]
        sent = 0
        for batch in _batches(out, missing):
            progress("sending", sent, len(missing) + 1)
            additions = [hub.CommitOperationAdd(file, out / file) for file in batch]
            _commit(api, name, additions, f"Add {len(batch)} files of the conversion")
            sent += len(batch)
        last = [
            hub.CommitOperationAdd(CARD, card.encode()),
            hub.CommitOperationAdd(FILE_NAME, out / FILE_NAME),
        ]
        url = _commit(api, name, last, "Add the manifest: the conversion is complete")
    size = sum((out / file).stat().st_size for file in missing)
    return Pushed(name.repository, url, sent + len(last), size, len(manifest.files) - sent)


def _commit(api: Any, name: Any, additions: list[Any], message: str) -> str:
    done = api.create_commit(
        name.repository, additions, commit_message=message, revision=name.revision
    )
    return str(done.commit_url)


def _remote(api: Any, name: str, revision: str | None) -> dict[str, str]:
    """The files of a repository: sha256 of large ones, git's own digest of others."""
    tree = api.list_repo_tree(name, recursive=True, revision=revision)
    files = (entry for entry in tree if hasattr(entry, "size"))  # and not folders
    return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}


def _blob_id(path: Path) -> str:
    """What git calls a file of this content."""
    content = path.read_bytes() if path.stat().st_size < 10_000_000 else b""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _batches(out: Path, files: list[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for file in files:
        own = (out / file).stat().st_size
        if batch and (len(batch) == BATCH_FILES or size + own > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(file)
        size += own
    if batch:
        yield batch
