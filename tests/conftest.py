"""All tests share a cache of their own: equal blocks are traced once in a run, which is most of a
small conversion."""

import gc
import itertools
import os
import tempfile
from pathlib import Path

import pytest

from ane_moe.user_cache import VARIABLE
from tests.slow_set import MARK, parse_slow

FREEZE_EVERY, THAW_EVERY = 15, 300  # tests


def pytest_addoption(parser) -> None:
    parser.addoption("--slow", metavar="all|N/M", help="the widest sweeps too: all, or part N of M")


def pytest_configure(config) -> None:
    config.tests_begun = itertools.count()
    if not hasattr(config, "workerinput"):  # workers of pytest-xdist inherit the variable
        config.cache_of_tests = tempfile.TemporaryDirectory(prefix="ane-moe-tests-")
        os.environ[VARIABLE] = str(Path(config.cache_of_tests.name))
    try:
        config.slow_set = parse_slow(config.getoption("--slow"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_report_header(config) -> str:
    return f"slow tests: {config.slow_set}"


def pytest_collection_modifyitems(config, items) -> None:
    left = [
        item
        for item in items
        if item.get_closest_marker(MARK) and not config.slow_set.holds(item.nodeid)
    ]
    config.hook.pytest_deselected(items=left)
    apart = set(left)
    items[:] = [item for item in items if item not in apart]


def pytest_runtest_setup(item) -> None:
    """Modules that tests import stay: coremltools collects garbage at each conversion, and would
    walk over all that they have made each time, which took a sixth of a run. What has become
    garbage since it was frozen goes seldom."""
    begun = next(item.config.tests_begun)
    if begun % FREEZE_EVERY:
        return
    if not begun % THAW_EVERY:
        gc.unfreeze()
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config) -> None:
    if not hasattr(config, "workerinput"):
        config.cache_of_tests.cleanup()
