"""Core AI's own packages, asked for only where something needs them."""

import contextlib
import importlib
import importlib.util
import io
import os
import warnings
from collections.abc import Iterator
from typing import Any

from ane_moe.errors import UserError

PACKAGES = ("coreai", "coreai_torch")
DISTRIBUTIONS = ("coreai-core", "coreai-torch")  # which have them
INSTALL = "pip install 'ane-moe[coreai]' (Linux on x86-64, or macOS)"


def require_packages() -> None:
    """Raise UserError, with what to install, unless PACKAGES are there; nothing is imported."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError("Core AI is not installed", f"no {', '.join(missing)}", INSTALL)


def core_ai(module: str) -> Any:
    """A module of PACKAGES. Raises UserError, with what to install, where it is not there."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of a torch built for the CPU
            return importlib.import_module(module)
    except ImportError as error:
        raise UserError("Core AI is not installed", str(error), INSTALL) from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what the packages print: a line on stdout for each graph that they convert, and one
    on the process's own stderr for each function that they load."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
