"""All tests share a cache of their own: equal blocks are traced once in a run, which is most of a
small conversion."""

import os
import tempfile
from pathlib import Path

from ane_moe.user_cache import VARIABLE


def pytest_configure(config) -> None:
    if not hasattr(config, "workerinput"):  # workers of pytest-xdist inherit the variable
        config.cache_of_tests = tempfile.TemporaryDirectory(prefix="ane-moe-tests-")
        os.environ[VARIABLE] = str(Path(config.cache_of_tests.name))


def pytest_unconfigure(config) -> None:
    if not hasattr(config, "workerinput"):
        config.cache_of_tests.cleanup()
