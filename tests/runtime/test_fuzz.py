from random import Random

import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import SEEDS, damaged_copy, exercise

MAX_GROWTH_BYTES = 400 << 20  # of the process, over all examples


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("fuzz") / "damaged.mlpackage"


@settings(deadline=None, max_examples=400, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(SEEDS), seed=st.integers(0, 2**64 - 1))
def test_a_damaged_package_is_refused_with_one_clear_error_or_runs(package, target, name, seed):
    before = psutil.Process().memory_info().rss
    source = package(name)
    exercise(damaged_copy(source, target, Random(seed)), execute=True)
    assert psutil.Process().memory_info().rss - before < MAX_GROWTH_BYTES


@pytest.mark.parametrize("name", SEEDS)
def test_an_undamaged_package_passes_everything_that_damaged_ones_go_through(package, name):
    assert exercise(package(name), execute=True)
