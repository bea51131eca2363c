"""The expert cache over real multi-function packages, as coremltools' own `save_multifunction`
makes them."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from ane_moe.coreml_tools import ct
from ane_moe.errors import UserError
from ane_moe.loop.expert_cache import FunctionKey
from ane_moe.loop.experts import ExpertDispatch, expert_layers, open_cache
from ane_moe.loop.figures import CallClock, PhaseFigures
from ane_moe.manifest import Shard
from tests.converted import save_converted
from tests.runtime.numpy_shards import D, expert_function, make_manifest

EXPERTS, WIDTH, BUCKETS = 3, 20, (1, 4)
PATH = "experts/layer_00.mlpackage"
WEIGHT_BYTES = 2 * (3 * D * WIDTH)  # the reference runtime holds fp16


class Expert(torch.nn.Module):
    """gate * down(silu(g(x)) * up(x))"""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.g, self.up = (torch.nn.Conv2d(D, WIDTH, 1, bias=False) for _ in range(2))
        self.down = torch.nn.Conv2d(WIDTH, D, 1, bias=False)

    def forward(self, ffn_input: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return gate * self.down(torch.nn.functional.silu(self.g(ffn_input)) * self.up(ffn_input))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A conversion's folder with one package: experts 0 to 2 for one and for four tokens."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("sparse")
    (folder / "experts").mkdir()
    description = ct.utils.MultiFunctionDescriptor()
    for e in range(EXPERTS):
        for tokens in BUCKETS:
            inputs = {"ffn_input": (1, D, 1, tokens), "gate": (1, 1, 1, tokens)}
            part = folder / f"{e}_{tokens}.mlpackage"
            save_converted(Expert(e).eval(), inputs, part)
            description.add_function(str(part), "main", f"expert_{e:03d}_t{tokens}")
    description.default_function_name = "expert_000_t1"
    ct.utils.save_multifunction(description, str(folder / PATH))
    return folder


def manifest():
    functions = tuple(
        expert_function(f"expert_{e:03d}_t{t}", t, (e,)) for e in range(EXPERTS) for t in BUCKETS
    )
    shard = Shard(PATH, "experts", 0, functions)
    return replace(make_manifest((None,), routing="sparse"), shards=(shard,))


def cache_of(folder, limit_bytes=None):
    return open_cache(folder, manifest(), "reference", limit_bytes)


@pytest.mark.parametrize("tokens, concurrency", [(1, 1), (3, 1), (9, 2)])
def test_dispatch_equals_the_modules_the_packages_were_made_from(folder, tokens, concurrency):
    rng = np.random.default_rng(tokens)
    x = rng.normal(size=(D, tokens)).astype(np.float16)
    gates = (rng.random((EXPERTS, tokens)) * (rng.random((EXPERTS, tokens)) < 0.6)).astype(
        np.float16
    )
    dispatch = ExpertDispatch(expert_layers(manifest()), cache_of(folder), concurrency)
    total = np.zeros((D, tokens), np.float32)
    dispatch.add(0, dispatch.chosen(0, gates), x, gates, total, CallClock(PhaseFigures()))
    with torch.no_grad():
        expected = sum(
            Expert(e)(
                torch.tensor(x, dtype=torch.float32)[None, :, None],
                torch.tensor(gates[e], dtype=torch.float32)[None, None, None],
            )[0, :, 0].numpy()
            for e in range(EXPERTS)
        )
    np.testing.assert_allclose(total, expected, atol=5e-3)


def test_a_loaded_function_counts_with_its_own_expert_alone(folder):
    cache = cache_of(folder)
    with cache.hold(FunctionKey(PATH, "expert_001_t4")):
        assert cache.figures.bytes_loaded == WEIGHT_BYTES


def test_a_limit_below_one_expert_is_refused(folder):
    cache = cache_of(folder, WEIGHT_BYTES - 1)
    with (
        pytest.raises(UserError, match="smaller than one expert"),
        cache.hold(FunctionKey(PATH, "expert_000_t1")),
    ):
        pass


def test_a_function_the_manifest_names_and_the_package_lacks_is_an_error(folder):
    with (
        pytest.raises(UserError, match="lacks an expert function"),
        cache_of(folder).hold(FunctionKey(PATH, "expert_003_t1")),
    ):
        pass


def test_a_package_cut_short_is_an_error(folder, tmp_path):
    shutil.copytree(folder / PATH, tmp_path / PATH)
    weights = next((tmp_path / PATH).rglob("weight.bin"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError), cache_of(tmp_path).hold(FunctionKey(PATH, "expert_002_t1")):
        pass
