"""Loading and running packages. Importing this needs neither torch nor coremltools."""

import importlib
import sys
from pathlib import Path
from typing import Any

from ane_moe.errors import UserError
from ane_moe.package_form import ASSET
from ane_moe.runtime.interface import LoadedFunction, Package

RUNTIMES = {
    "reference": "ane_moe.runtime.reference.runtime",
    "coreml": "ane_moe.runtime.coreml.runtime",
    "coreai": "ane_moe.runtime.coreai.runtime",
}


def resolve_runtime(name: str, package: str | Path = "") -> str:
    """`auto` as the runtime it stands for here: coreai for a `package` of Core AI's, else coreml on
    macOS, reference elsewhere. Raises UserError if unknown, and where it cannot run the package."""
    is_asset, usual = str(package).endswith(ASSET), "reference"
    if is_asset:
        usual = "coreai"
    elif sys.platform == "darwin":
        usual = "coreml"
    resolved = usual if name == "auto" else name
    if resolved not in RUNTIMES:
        raise UserError(
            "Unknown runtime", found=name, do=f"choose one of: auto, {', '.join(RUNTIMES)}"
        )
    if is_asset and resolved != "coreai":
        raise UserError(
            f"Core AI's assets ({ASSET}) run in the coreai runtime alone",
            f"--runtime {resolved}",
            "leave --runtime out",
        )
    return resolved


def with_precision(
    name: str, precision: str, package: str | Path = ""
) -> tuple[str, dict[str, Any]]:
    """The runtime for a precision, and its options. Only the reference runtime knows any but fp32:
    `auto` stands for it then, and another one is refused with UserError, as is a `package` that it
    cannot run."""
    if precision == "fp32":
        return resolve_runtime(name, package), {}
    is_asset = str(package).endswith(ASSET)
    if not is_asset and (name == "auto" or resolve_runtime(name) == "reference"):
        return "reference", {"precision": precision}
    chosen = resolve_runtime(name, package)
    raise UserError(
        "only the reference runtime computes in another precision",
        chosen,
        f"leave --{'precision' if is_asset else 'runtime'} out",
    )


def open_package(path: str | Path, runtime: str = "auto", **options: Any) -> Package:
    """Open an `.mlpackage` or `.aimodel`, to load several of its functions.

    `options` go to the runtime: see `reference.open_package` and `coreml.open_package`.
    Raises UserError for a package that cannot be read.
    """
    module = importlib.import_module(RUNTIMES[resolve_runtime(runtime, path)])
    package: Package = module.open_package(Path(path), **options)
    return package


def session_options(runtime: str, memory_mb: float | None, stored_bytes: int) -> dict[str, Any]:
    """Options of `open_package` that packages of one session share: `stored_bytes` are of all of
    them, and their weights may take `memory_mb` (10^6 bytes; None: as the runtime sees fit).

    Raises UserError where the runtime cannot be told.
    """
    module = importlib.import_module(RUNTIMES[resolve_runtime(runtime)])
    options: dict[str, Any] = module.session_options(memory_mb, stored_bytes)
    return options


def load_package(
    path: str | Path, function: str | None = None, runtime: str = "auto", **options: Any
) -> LoadedFunction:
    """Load one function of an `.mlpackage` or `.aimodel` (the default function when none is named).

    `options` are those of `open_package`. Raises UserError for a package that cannot be read, an
    unknown function, or an op the runtime lacks.
    """
    return open_package(path, runtime, **options).function(function)
