"""The folder a conversion writes: taken for one conversion at a time, and swept of what an earlier
one left."""

import json
import re
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from ane_moe.checkpoints.adapter import adapter_name
from ane_moe.conversion.early import FILE_NAME as EARLY
from ane_moe.conversion.job import Job
from ane_moe.conversion.plan import (
    EMBED,
    EXPERTS,
    FOLDERS,
    GOLDEN_FILES,
    ROUTERS,
    ConversionPlan,
    ConvertOptions,
)
from ane_moe.conversion.side_files import LABEL_FILES
from ane_moe.emit.coreml.package import ContentKey
from ane_moe.errors import UserError
from ane_moe.files import TEMPORARY, require_room, write_text
from ane_moe.formats.calibration import FILE_NAME as CALIBRATION
from ane_moe.manifest import FILE_NAME, Manifest
from ane_moe.original.checkpoint_tokenizer import ALL_FILES as TOKENIZER_FILES
from ane_moe.package_form import ASSET, PACKAGE

MARKER = ".converting.json"  # present while a conversion is unfinished: which one it is
# Beside the shards, and not always.
ALONE = (*TOKENIZER_FILES, EARLY, GOLDEN_FILES, *LABEL_FILES, CALIBRATION, EMBED)
# Packages, stores and tables of an output with what is in them, and what is half-written.
OURS = re.compile(
    rf"(?:{'|'.join(FOLDERS)})/[^/]+(?:{re.escape(PACKAGE)}|{re.escape(ASSET)})(?:/.*)?"
    rf"|(?:{ROUTERS}|{EXPERTS})/layer_\d+\.bin"
    rf"|(?:(?:{'|'.join(FOLDERS)})/)?{re.escape(TEMPORARY)}[^/]*(?:/.*)?",
    re.DOTALL,
)


def claim(job: Job, overwrite: bool) -> None:
    """Take the output folder: a new or empty one, or one that an earlier run of the same conversion
    began."""
    what, out, where = identity(job), job.out, job.away or job.out
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is not a folder", do="name another output folder")
    marker = out / MARKER
    if out.is_dir() and any(out.iterdir()):
        found = _identity_on_disk(out)
        if found is None and not marker.exists():
            raise of_something_else(where)
        if found != what and not overwrite:
            raise of_another(where)
        sweep_unfinished(out)
    out.mkdir(parents=True, exist_ok=True)
    write_text(marker, json.dumps(what, sort_keys=True) + "\n")
    (out / FILE_NAME).unlink(missing_ok=True)


def of_something_else(where: object) -> UserError:
    """The error for a place with files that no conversion wrote."""
    return UserError(
        f"{where} holds something else", f"no {FILE_NAME} in it", "name another output folder"
    )


def of_another(where: object) -> UserError:
    """The error for a place that is taken."""
    do = "name another folder, or replace it with --overwrite"
    return UserError(f"{where} holds another conversion", do=do)


def identity(job: Job) -> dict[str, str]:
    """What tells two conversions apart at a glance; the content keys tell for certain."""
    plan = job.plan
    return {
        "config": ContentKey(json.dumps(job.checkpoint.config, sort_keys=True)).digest(),
        "options": repr(_settled(plan)),
    }


def _settled(plan: ConversionPlan) -> ConvertOptions:
    """The options with what was left to the model filled in, and without what is chosen while
    converting."""
    lengths, adapters = plan.lengths or None, tuple(map(adapter_name, plan.options.adapters))
    settled = replace(plan.options, context=plan.context, layers=plan.layers, lengths=lengths)
    early = plan.options.early and Path(plan.options.early).name
    recipe = ConvertOptions().recipe if plan.options.chooses_formats else plan.options.recipe
    return replace(settled, adapters=adapters, early=early, recipe=recipe)


def _identity_on_disk(out: Path) -> dict[str, str] | None:
    """What the folder holds, or would hold when finished; None when it is no conversion. One of
    another version, or one that is damaged, is another conversion."""
    unfinished, finished = out / MARKER, out / FILE_NAME
    try:
        if unfinished.exists():
            return dict(json.loads(unfinished.read_text()))
        return dict(json.loads(finished.read_text())["source"]) if finished.exists() else None
    except (ValueError, KeyError, TypeError):
        return {} if finished.exists() else None


def require_disk(out: Path, conversion: ConversionPlan) -> None:
    present = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    require_room(out, conversion.disk_bytes - present, out)


def sweep_unfinished(out: Path) -> None:
    """Delete what a killed run left half-written in the folder of a conversion."""
    _delete(out, (name for name in strangers(_names(out), ()) if TEMPORARY in name))


def remove_strangers(out: Path, manifest: Manifest) -> None:
    """Delete the `strangers` of the folder of a conversion."""
    _delete(out, strangers(_names(out), manifest.files))


def strangers(names: Collection[str], kept: Collection[str]) -> list[str]:
    """What an earlier conversion left, or a killed one, and is none of the `kept` files: of the
    files and folders of an output those that conversions write, where they write them. A
    conversion that lies further down is another one."""
    told = (PurePosixPath(name) for name in names)
    others = {path.parent for path in told if path.name in (FILE_NAME, MARKER) and path.parts[1:]}
    needed = {*kept, *(str(parent) for name in kept for parent in PurePosixPath(name).parents)}
    return [
        name
        for name in names
        if name not in needed and _is_ours(name) and others.isdisjoint(PurePosixPath(name).parents)
    ]


def _is_ours(name: str) -> bool:
    return is_beside(name, ALONE) or OURS.fullmatch(name) is not None


def is_beside(name: str, patterns: Iterable[str]) -> bool:
    """Whether a file lies beside the shards under a name of these."""
    return "/" not in name and any(fnmatchcase(name, pattern) for pattern in patterns)


def _names(out: Path) -> list[str]:
    """Files and folders of an output where a conversion writes."""
    inside = (path for folder in FOLDERS for path in (out / folder).rglob("*"))
    beside = (path for path in out.glob(f"{TEMPORARY}*") if not path.is_symlink())
    below = (path for folder in beside for path in folder.rglob("*"))
    return [path.relative_to(out).as_posix() for path in (*out.glob("*"), *inside, *below)]


def _delete(out: Path, names: Iterable[str]) -> None:
    """Files, and folders that are empty then."""
    for path in (out / name for name in sorted(names, reverse=True)):
        if path.is_dir() and not path.is_symlink():
            with suppress(OSError):
                path.rmdir()
        else:
            path.unlink(missing_ok=True)
