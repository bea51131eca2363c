"""coremltools, imported quietly. Nothing else in the package imports it directly, so that this runs
first.

Off macOS it warns about eight native libraries that only macOS has, and everywhere about the
versions of torch and scikit-learn; its converter draws progress bars of its own. None of that is
for our users. Errors stay visible.
"""

import functools
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from ane_moe.absent_modules import absent_modules

logging.getLogger("coremltools").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="overflow encountered in cast", module="coremltools")
# Tracing is the way into coremltools; torch 2.14 begins to advise other ways.
warnings.filterwarnings("ignore", message="`torch.jit.trace", category=FutureWarning)

# It imports scikit-learn, most of a second, for converters of its models: none of ours.
with absent_modules("sklearn"):
    import coremltools as ct
    from coremltools import _deps
    from coremltools.converters.mil.mil.passes import pass_pipeline as _pass_pipeline
    from coremltools.libmilstoragepython import _BlobStorageReader as BlobReader
    from coremltools.libmilstoragepython import _BlobStorageWriter as BlobWriter
    from coremltools.proto import FeatureTypes_pb2, MIL_pb2, Model_pb2

# coremltools offers no switch for its progress bars.
_pass_pipeline.tqdm = functools.partial(_pass_pipeline.tqdm, disable=True)
if _deps._HAS_TORCH:  # not in a process that converts nothing: runtime/coreml/trial.py
    from coremltools.converters.mil.frontend.torch import ops as _torch_frontend

    _torch_frontend._tqdm = functools.partial(_torch_frontend._tqdm, disable=True)

__all__ = [
    "BlobReader",
    "BlobWriter",
    "FeatureTypes_pb2",
    "MIL_pb2",
    "Model_pb2",
    "ct",
    "validating_once",
]


@contextmanager
def validating_once() -> Iterator[None]:
    """Within, `ct.convert` does not check the program after every graph pass, a third of its time
    (32 experts: 3.5 s against 5.0 s of one core, the same bytes). Whoever uses it checks the
    result."""
    with mock.patch.object(ct.converters.mil.mil.Program, "validate", lambda *_, **__: None):
        yield
