"""Putting the stand-in in place of `coremltools.libcoremlpython`.

In a fresh process it goes into `sys.modules` before coremltools is imported, which then binds its
classes by itself. Where coremltools is imported already, the names that its import left at None are
bound here. Beside that:

* `_is_macos` (models/utils.py, copied into models/model.py) is made to answer yes. It guards
  `make_state`, and through `_macos_version` compiling and `CompiledMLModel`. `sys.platform` stays.
* `_deps._IS_MACOS` says yes to whoever imports it later: without it coremltools' `compare_backend`,
  by which its own tests and those of other converters compare, predicts nothing and passes.
* `_macos_version` stays as it is: it runs `sw_vers`, and `environment` puts one on the PATH. Its
  cache is cleared.
"""

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.standin.script import VARIABLE, Script

MODULE = "coremltools.libcoremlpython"
ROOT = Path(__file__).parents[2]

# Every module-level import from the native module in coremltools 9 outside
# models/ml_program/experimental, whose classes derive from the proxies and are used with remote
# devices only.
BOUND = {
    "coremltools.models.model": ("_MLModelProxy", "_MLModelAssetProxy"),
    "coremltools.models._compiled_model": ("_MLModelProxy",),
    "coremltools.models.compute_plan": ("_MLModelProxy", "_MLComputePlanProxy"),
    "coremltools.models.compute_device": (
        "_MLModelProxy",
        "_MLCPUComputeDeviceProxy",
        "_MLGPUComputeDeviceProxy",
        "_MLNeuralEngineComputeDeviceProxy",
    ),
}
ASKS_FOR_MACOS = ("coremltools.models.utils", "coremltools.models.model")

SW_VERS = """#!/bin/sh
case "$1" in
    -productVersion) echo "{macos}" ;;
    -buildVersion) echo "{build}" ;;
    *) exit 1 ;;
esac
"""


def install(
    set_attribute: Callable[[Any, str, Any], None] = setattr,
    set_item: Callable[[Any, str, Any], None] = dict.__setitem__,
) -> None:
    """Replace the native module; the two setters may be a monkeypatch's, so that it is undone."""
    from tests.standin import native

    set_item(sys.modules, MODULE, native)
    importlib.import_module("ane_moe.coreml_tools")  # coremltools, quietly
    for module, names in BOUND.items():
        for name in names:
            set_attribute(importlib.import_module(module), name, getattr(native, name))
    for module in ASKS_FOR_MACOS:
        set_attribute(importlib.import_module(module), "_is_macos", lambda: True)
    set_attribute(importlib.import_module("coremltools._deps"), "_IS_MACOS", True)
    importlib.import_module("coremltools.models.utils")._macos_version.cache_clear()


def environment(folder: Path, script: Script) -> dict[str, str]:
    """Variables under which a new Python process has the stand-in; `folder` takes the script and a
    `sw_vers`."""
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    tool = folder / "bin" / "sw_vers"
    tool.write_text(SW_VERS.format(macos=script.macos, build=script.build))
    tool.chmod(0o755)
    script.write(folder / "script.json")
    paths = [str(ROOT), str(Path(__file__).parent / "site"), os.environ.get("PYTHONPATH", "")]
    return {
        VARIABLE: str(folder / "script.json"),
        "PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
    }
