"""Templates kept on disk: a model of a geometry that was converted before traces nothing.

    FOLDER/DIGEST.template      a line of JSON, then the serialised protobuf

DIGEST is of the key and of all that decides a template beside it: the versions of the tools and the
source of our parts. What lies in the folder is read as data, and not believed: an entry that is
damaged, or of another key, is made anew.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import ane_moe
from ane_moe.emit.coreml.template import Template
from ane_moe.files import scratch_folder
from ane_moe.model.template_key import TemplateKey
from ane_moe.user_cache import user_cache

SUFFIX = ".template"
MOST = 200  # entries kept, of up to half a megabyte each; the ones not used for longest go


@dataclass(frozen=True)
class Making:
    """What decides a template beside its key: versions of `tools`, and where our own part of it is
    written."""

    tools: tuple[str, ...] = ("coremltools", "torch", "numpy", "protobuf")
    sources: tuple[str, ...] = ("coreml_tools.py", "emit/coreml", "model", "parts")


CORE_ML = Making()


@dataclass(frozen=True)
class Kept:
    """One entry: its size, and when it was used last, in seconds since the epoch."""

    path: Path
    size_bytes: int
    last_used: float


class TemplateCache:
    """The templates in `folder`, by default of the user's cache. A folder that cannot be written to
    keeps nothing, and is no error."""

    def __init__(self, folder: Path | None = None, making: Making = CORE_ML):
        self.folder = folder or user_cache() / "templates"
        self._making = making

    def find(self, key: TemplateKey) -> Template | None:
        """The template of `key`; None where there is none that is sound."""
        path = self._path(key)
        try:
            line, _, model = path.read_bytes().partition(b"\n")
            about = json.loads(line)
            sound = about["key"] == repr(key) and about["sha256"] == _sha256(model)
            weights = {
                str(name): tuple(map(int, shape)) for name, shape in about["weights"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        if not sound or list(weights) != [row.path for row in key.block.rows()]:
            return None
        with suppress(OSError):
            os.utime(path)
        return Template(model, weights)

    def keep(self, key: TemplateKey, template: Template) -> None:
        """Keep the template of `key` for the next conversion."""
        about = {
            "key": repr(key),
            "sha256": _sha256(template.model),
            "weights": template.weights,
        }
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with scratch_folder(self.folder, "template") as scratch:  # of this process alone
                whole = scratch / "whole"
                whole.write_bytes(json.dumps(about).encode() + b"\n" + template.model)
                os.replace(whole, self._path(key))
            for entry in sorted(self.entries(), key=lambda entry: -entry.last_used)[MOST:]:
                entry.path.unlink(missing_ok=True)

    def entries(self) -> list[Kept]:
        """What is kept."""
        return list(self._entries())

    def clear(self) -> list[Kept]:
        """Remove every template; returns what was there."""
        removed = self.entries()
        for entry in removed:
            entry.path.unlink(missing_ok=True)
        return removed

    def _entries(self) -> Iterator[Kept]:
        for path in self.folder.glob(f"*{SUFFIX}"):
            with suppress(OSError):  # another process may remove it
                found = path.stat()
                yield Kept(path, found.st_size, found.st_mtime)

    def _path(self, key: TemplateKey) -> Path:
        versions = {name: version(name) for name in self._making.tools}
        facts = (key, versions, _source(self._making.sources))
        return self.folder / (_sha256(repr(facts).encode()) + SUFFIX)


@cache
def _source(names: tuple[str, ...]) -> str:
    """sha256 over the files that decide a template."""
    root, digest = Path(ane_moe.__file__).parent, hashlib.sha256()
    for name in names:
        for path in sorted((root / name).rglob("*.py")) or [root / name]:
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
