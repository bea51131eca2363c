"""The folder that is an .mlpackage (Manifest.json and the files it may name) or an .mlmodelc.

A package is untrusted: every path it names is resolved, must stay inside it and must be a regular
file.
"""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ane_moe.errors import UserError
from ane_moe.lfs import FETCH, is_lfs_pointer
from ane_moe.package_form import ASSET, PACKAGE

MAX_MANIFEST_BYTES = 1 << 20  # real ones have under 1 kB
MAX_MODEL_BYTES = 64 << 20  # programs without their weights: 10,000 operations take about 5 MB
MODEL_PATH = "@model_path/"
COMPILED = ".mlmodelc"


class AbsentFile(UserError):
    """A file that the package names is not there, or only a Git LFS pointer to it."""


@dataclass(frozen=True)
class Container:
    """A package whose manifest has been read, or a compiled model, or a stage of one.

    `root` is resolved; `model` is the program file inside it, in a compiled model its text.
    """

    root: Path
    model: Path

    @property
    def compiled(self) -> bool:
        return self.root.suffix == COMPILED

    def model_bytes(self) -> bytes:
        """The serialized program (no weights)."""
        return _read_limited(self.model, MAX_MODEL_BYTES)

    def file_beside(self, name: str, limit: int) -> bytes | None:
        """The file `name` beside the program file, None if there is none."""
        if not os.path.lexists(self.model.parent / name):
            return None
        return _read_limited(_inside(self.root, self.model.parent, name), limit)

    def stage(self, index: int) -> "Container":
        """The stage `index` of a compiled pipeline, a folder of its own."""
        folder = self.root / f"model{index}"
        return Container(self.root, _inside(self.root, folder, "model.mil"))

    def weight_file(self, name: str) -> Path:
        """The file that a constant names as "@model_path/weights/weight.bin", beside the program
        file."""
        if not name.startswith(MODEL_PATH):
            raise UserError(
                "weight file is not named relative to the program",
                quoted(name),
                f"expected {MODEL_PATH}",
            )
        path = _inside(self.root, self.model.parent, name.removeprefix(MODEL_PATH))
        require_content(path)
        return path


def open_container(path: Path) -> Container:
    """Open an .mlpackage or .mlmodelc folder. Raises UserError for anything that is neither."""
    if path.is_file():
        raise UserError(
            "expected an .mlpackage folder",
            f"file {path}",
            "re-convert .mlmodel files as ML Programs",
        )
    if not path.is_dir():
        raise UserError("no such package", str(path), "check the path")
    root = path.resolve()
    if root.suffix == COMPILED:
        return _open_compiled(root)
    if not os.path.exists(
        root / "Manifest.json"
    ):  # unlike Path.exists, False where it may not look
        _refuse_folder_of(path)
        raise UserError(
            "not an .mlpackage: it has no Manifest.json", str(path), "point at the package itself"
        )
    manifest = _manifest(_inside(root, root, "Manifest.json"))
    entries, identifier = manifest.get("itemInfoEntries"), manifest.get("rootModelIdentifier")
    item = (
        entries.get(identifier)
        if isinstance(entries, dict) and isinstance(identifier, str)
        else None
    )
    relative = item.get("path") if isinstance(item, dict) else None
    if not isinstance(relative, str):
        raise UserError(
            "Manifest.json names no root model", quoted(identifier), "the package is damaged"
        )
    return Container(root, _inside(root, root / "Data", relative))


def _refuse_folder_of(path: Path) -> None:
    """Raise UserError for a folder that has packages in it."""
    with suppress(OSError):
        inside = sorted(each for each in path.iterdir() if each.suffix in (PACKAGE, ASSET))
        if inside:
            raise UserError(
                f"{path} is a folder of packages",
                f"{len(inside)} of them",
                f"name one: {inside[0]}",
            )


def _open_compiled(root: Path) -> Container:
    """The program is model.mil; a pipeline has only metadata.json at its root."""
    names = [name for name in ("model.mil", "metadata.json") if os.path.lexists(root / name)]
    staged = os.path.lexists(root / "model0")
    if not names or (names[0] != "model.mil" and not staged):
        raise UserError(
            "the compiled model holds no ML Program (no model.mil)",
            str(root.name),
            "only compiled ML Programs can be read: re-convert others",
        )
    return Container(root, _inside(root, root, names[0]))


def require_content(path: Path) -> None:
    """Raise AbsentFile where a Git LFS pointer stands for the file."""
    if is_lfs_pointer(path):
        raise AbsentFile(f"{path.name} has not been downloaded", "a Git LFS pointer", FETCH)


def quoted(value: object) -> str:
    """Untrusted text for a message: one line, short, no control characters."""
    text = ascii(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _manifest(path: Path) -> dict:
    try:
        manifest = json.loads(_read_limited(path, MAX_MANIFEST_BYTES))
    except (ValueError, RecursionError) as error:
        raise UserError(
            "Manifest.json is not valid JSON", type(error).__name__, "the package is damaged"
        ) from None
    if not isinstance(manifest, dict):
        raise UserError(
            "Manifest.json is not an object", type(manifest).__name__, "the package is damaged"
        )
    version = manifest.get("fileFormatVersion")
    if not isinstance(version, str) or version.split(".")[0] != "1":
        raise UserError(
            "unknown package format version", quoted(version), "only 1.x packages are known"
        )
    return manifest


def _inside(root: Path, folder: Path, relative: str) -> Path:
    """Resolve `relative` below `folder`; it must be a regular file within `root`, links
    included."""
    pure = PurePosixPath(relative)
    if pure.is_absolute() or ".." in pure.parts or "\\" in relative or not pure.parts:
        raise UserError(
            "package names a path outside itself", quoted(relative), "do not use this package"
        )
    try:
        path = (folder / pure).resolve()
        outside, regular = not path.is_relative_to(root), path.is_file()
    except (
        OSError,
        ValueError,
        RuntimeError,
    ):  # too long, a NUL or a lone surrogate, a loop of links
        raise UserError(
            "package names an unusable path", quoted(relative), "the package is damaged"
        ) from None
    if outside:
        raise UserError(
            "package holds a link that leads outside it",
            quoted(relative),
            "copy it with its links resolved (cp -RL) if you trust it",
        )
    if not regular:
        raise AbsentFile(
            "package lacks a file it names", quoted(relative), "download or convert it again"
        )
    return path


def _read_limited(path: Path, limit: int) -> bytes:
    require_content(path)
    try:
        size = path.stat().st_size
        if size > limit:
            raise UserError(f"{path.name} is too large", f"{size} bytes", f"the limit is {limit}")
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read {path.name}", str(error.strerror), "check the permissions"
        ) from None
