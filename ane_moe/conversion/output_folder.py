"""The folder a conversion writes: taken for one conversion at a time, and swept of what an earlier
one left."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

from ane_moe.checkpoints.adapter import adapter_name
from ane_moe.conversion.early import FILE_NAME as EARLY
from ane_moe.conversion.job import Job
from ane_moe.conversion.plan import MB, ROUTERS, ConversionPlan, ConvertOptions
from ane_moe.emit.coreml.package import ContentKey
from ane_moe.errors import UserError
from ane_moe.files import sweep, write_text
from ane_moe.manifest import FILE_NAME, Manifest
from ane_moe.original.checkpoint_tokenizer import ALL_FILES as TOKENIZER_FILES
from ane_moe.package_form import ASSET, PACKAGE

MARKER = ".converting.json"  # present while a conversion is unfinished: which one it is
LOOSE = (*TOKENIZER_FILES, EARLY, "golden*.safetensors")  # beside the shards, and not always


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
        sweep(out)
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
    """The options with what was left to the model filled in."""
    lengths, adapters = plan.lengths or None, tuple(map(adapter_name, plan.options.adapters))
    settled = replace(plan.options, context=plan.context, layers=plan.layers, lengths=lengths)
    early = plan.options.early and Path(plan.options.early).name
    return replace(settled, adapters=adapters, early=early)


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
    needed, free = conversion.disk_bytes - present, shutil.disk_usage(out).free
    if needed > free:
        raise UserError(
            f"the disk is too full for {out}",
            f"{free / MB:.0f} MB free, {needed / MB:.0f} MB needed",
        )


def remove_strangers(out: Path, manifest: Manifest) -> None:
    """What an earlier conversion left and this one does not name: shards, routers,
    tokenizers, goldens."""
    kept = {shard.path for shard in manifest.shards}
    for path in [*out.rglob(f"*{PACKAGE}"), *out.rglob(f"*{ASSET}")]:
        if path.relative_to(out).as_posix() not in kept:
            shutil.rmtree(path)
    loose = [path for pattern in LOOSE for path in out.glob(pattern)]
    for path in (*(out / ROUTERS).glob("*"), *(out / "experts").glob("*.bin"), *loose):
        if path.relative_to(out).as_posix() not in manifest.files:
            path.unlink()
