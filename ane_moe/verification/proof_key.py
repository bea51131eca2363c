"""What the results of a proof depend on, gates apart: a run goes on with those of another one only
where all of it is the same."""

import hashlib
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ane_moe
from ane_moe.files import sha256
from ane_moe.kept import content_key
from ane_moe.manifest import FILE_NAME

TOOLS = ("numpy", "torch", "transformers")


def proof_key(
    out: Path,
    sources: Sequence[Path],
    prompts: Path | None,
    runtime: str,
    options: Mapping[str, Any],
    scope: tuple[object, ...],
) -> str:
    """The content key of a proof of the conversion in `out`, whose files were checked against the
    manifest. `scope` is what is looked at.

    Files of `sources`, a checkpoint and its adapters, are known by place, inode, size and times of
    change: whoever writes to one changes these. Raises UserError when the prompts cannot be read.
    """
    tools = (_code(), platform.platform(), *map(version, TOOLS))
    golden = (_text(prompts), [sorted(_files(folder)) for folder in sources])
    return content_key(
        (sha256(out / FILE_NAME), runtime, sorted(options.items()), scope, tools, golden)
    )


def _text(path: Path | None) -> str | None:
    try:
        return None if path is None else sha256(path)
    except OSError:  # who reads it says so
        return None


def _files(folder: Path) -> Iterator[tuple[str, int, int, int, int]]:
    for path in folder.rglob("*"):
        if path.is_file():
            facts = path.stat()
            times = (facts.st_mtime_ns, facts.st_ctime_ns)
            yield str(path.resolve()), facts.st_ino, facts.st_size, *times


def _code() -> str:
    """sha256 of our own source: results of another version are not gone on with."""
    sha = hashlib.sha256()
    for path in sorted(Path(ane_moe.__file__).parent.rglob("*.py")):
        sha.update(path.read_bytes())
    return sha.hexdigest()
