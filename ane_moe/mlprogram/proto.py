"""The Core ML protobuf classes, without the rest of coremltools.

`import coremltools.proto` runs the whole converter's import (seconds, and warnings about missing
macOS libraries). The generated modules need only protobuf and each other, so they are imported from
the same files under a package name of our own. protobuf registers each file once, so these are the
very classes coremltools itself uses.
"""

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

from ane_moe.errors import UserError

_ALIAS = "ane_moe_coreml_proto"


def _generated(name: str) -> Any:
    if _ALIAS not in sys.modules:
        spec = importlib.util.find_spec("coremltools")
        if spec is None or not spec.submodule_search_locations:
            raise UserError("coremltools is not installed", do="pip install 'coremltools>=9,<10'")
        package = types.ModuleType(_ALIAS)
        package.__path__ = [str(Path(spec.submodule_search_locations[0]) / "proto")]
        sys.modules[_ALIAS] = package
    return importlib.import_module(f"{_ALIAS}.{name}")


MIL_pb2 = _generated("MIL_pb2")
FeatureTypes_pb2 = _generated("FeatureTypes_pb2")
Model_pb2 = _generated("Model_pb2")
