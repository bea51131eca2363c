"""Apple's Core AI runtime behind our interface. What needs its packages is skipped without them."""

import asyncio
import gc
import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ane_moe.cli import main
from ane_moe.errors import UserError
from ane_moe.mlprogram.reader import read_program
from ane_moe.runtime import load_package, open_package
from ane_moe.runtime.arrays import random_inputs
from ane_moe.runtime.interface import NotExecuted
from tests.converted import save_converted

HAS_CORE_AI = importlib.util.find_spec("coreai_torch") is not None
needs_core_ai = pytest.mark.skipif(not HAS_CORE_AI, reason="Core AI's packages are not installed")


class Mixed(nn.Module):
    """Most operations of our graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(8, 12, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt((x * x).mean(1, keepdim=True) + 1e-5)
        both = self.convolution(x * scale)
        up, gate = both[:, :6], both[:, 6:]
        heads = (up * torch.sigmoid(gate)).reshape(1, 2, 3, 4)
        weights = torch.softmax(heads @ heads.transpose(2, 3), -1)
        mixed = torch.cat([weights @ heads, heads - heads.amax(2, keepdim=True)], 2)
        clipped = mixed.abs().clip(0.1, 2) / (1 + mixed.sum(1, keepdim=True).abs())
        return torch.tanh(clipped) + torch.nn.functional.softplus(clipped)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> tuple[Mixed, Path]:
    torch.manual_seed(0)
    module, path = Mixed().eval(), tmp_path_factory.mktemp("mixed") / "mixed.mlpackage"
    save_converted(module, {"x": (1, 8, 1, 4)}, path)
    return module, path


@pytest.fixture(scope="module")
def asset(package: tuple[Mixed, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's twin as it lies on disk."""
    from ane_moe.runtime.coreai.twin import save_twin

    program = read_program(package[1])
    path = tmp_path_factory.mktemp("asset") / "mixed.aimodel"
    save_twin(program, program.default_function, path)
    return path


@needs_core_ai
def test_core_ai_computes_what_torch_does(package: tuple[Mixed, Path]) -> None:
    module, path = package
    x = np.random.default_rng(0).standard_normal((1, 8, 1, 4)).astype(np.float16)
    given = load_package(path, runtime="coreai").predict({"x": x})["y"]
    with torch.no_grad():
        expected = module(torch.from_numpy(x).float()).numpy()
    assert given.dtype == np.float16
    np.testing.assert_allclose(given, expected, atol=4e-3)


@needs_core_ai
def test_an_asset_is_run_by_its_own_description(
    package: tuple[Mixed, Path], asset: Path, tmp_path: Path
) -> None:
    twin, own = load_package(package[1], runtime="coreai"), load_package(asset, runtime="coreai")
    assert [feature.name for feature in own.inputs] == ["x"]
    inputs = random_inputs(own.inputs, 3)
    np.testing.assert_array_equal(own.predict(inputs)["y"], twin.predict(inputs)["y"])
    with pytest.raises(UserError, match="shape"):
        own.predict({"x": np.zeros((1, 8, 1, 5), np.float16)})
    with pytest.raises(UserError, match="functions: main"):
        open_package(asset, "coreai").function("decode")


@needs_core_ai
def test_its_matmul_rounds_each_product_and_each_sum_to_fp16(tmp_path: Path) -> None:
    """By hand, in order: so that another runtime's deviation is known, and a mended one noticed."""

    class Product(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x @ y

    path = tmp_path / "product.mlpackage"
    save_converted(Product(), {"a": (1, 1, 3, 128), "b": (1, 1, 128, 5)}, path)
    rng = np.random.default_rng(1)
    a, b = (rng.standard_normal(shape).astype(np.float16) for shape in ((3, 128), (128, 5)))
    total = np.zeros((3, 5), np.float16)
    for column, row in zip(a.T, b, strict=True):
        total = total + column[:, None] * row
    function = load_package(path, runtime="coreai")
    given = function.predict({"a": a[None, None], "b": b[None, None]})["y"]
    np.testing.assert_array_equal(given[0, 0], total)
    assert np.abs(total - a.astype(np.float64) @ b).max() > 0.01


@needs_core_ai
@pytest.mark.parametrize("damage", ["flipped", "truncated", "no program", "no digest"])
def test_a_damaged_asset_is_one_line(
    asset: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(asset, tmp_path / "copy.aimodel"))
    content = (copy / "main.mlirb").read_bytes()
    if damage == "flipped":
        middle = len(content) // 2
        flipped = bytes([content[middle] ^ 1])
        (copy / "main.mlirb").write_bytes(content[:middle] + flipped + content[middle + 1 :])
    elif damage == "truncated":
        (copy / "main.mlirb").write_bytes(content[:100])
    else:
        (copy / ("main.mlirb" if damage == "no program" else "main.hash")).unlink()
    with pytest.raises(SystemExit) as ended:
        main(["run", str(copy), "--runtime", "coreai", "--seed", "0"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "make it again" in line


class Best(nn.Module):
    """The most and the least of an axis, and where they are."""

    def __init__(self, count: int, axis: int):
        super().__init__()
        self.count, self.axis = count, axis

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        most, least = (
            torch.topk(x, self.count, dim=self.axis, largest=largest) for largest in (True, False)
        )
        return torch.cat([*(one[0] for one in (most, least)), most[1].half(), least[1].half()], 1)


@needs_core_ai
@pytest.mark.parametrize("axis", [1, 3])
def test_of_equal_numbers_topk_takes_the_first_ones(axis: int, tmp_path: Path) -> None:
    """As a stable sort, which torch's own topk is not; so does the reference runtime."""
    path = tmp_path / "best.mlpackage"
    save_converted(Best(5, axis), {"x": (1, 40, 1, 40)}, path)
    x = np.random.default_rng(2).integers(-6, 6, (1, 40, 1, 40)).astype(np.float16)
    sorts = [
        torch.sort(torch.from_numpy(x), dim=axis, descending=first, stable=True)
        for first in (True, False)
    ]
    parts = [*(one[0] for one in sorts), *(one[1].half() for one in sorts)]
    expected = torch.cat([part.narrow(axis, 0, 5) for part in parts], 1).numpy()
    for runtime in ("coreai", "reference"):
        given = load_package(path, runtime=runtime).predict({"x": x})["y"]
        np.testing.assert_array_equal(given, expected)


@needs_core_ai
def test_an_operation_that_the_twin_lacks_is_named(tmp_path: Path) -> None:
    class Added(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cumsum(x, dim=1)

    path = tmp_path / "added.mlpackage"
    save_converted(Added(), {"x": (1, 8, 1, 4)}, path)
    with pytest.raises(NotExecuted, match="cumsum"):
        load_package(path, runtime="coreai")


@needs_core_ai
def test_nothing_of_a_call_is_kept(asset: Path) -> None:
    """Not a handle of the loop's, on which its results would hang."""
    function = load_package(asset, runtime="coreai")
    inputs = random_inputs(function.inputs, 0)

    def handles_after(calls: int) -> int:
        for _ in range(calls):
            function.predict(inputs)
        gc.collect()
        return sum(isinstance(one, asyncio.Handle) for one in gc.get_objects())

    before = handles_after(1)
    assert handles_after(20) < before + 10  # the loop may be at its own work


def test_without_the_packages_there_is_one_line(
    package: tuple[Mixed, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "coreai.runtime", None)
    monkeypatch.setitem(sys.modules, "coreai", None)
    with pytest.raises(UserError, match=r"not installed.*pip install 'ane-moe\[coreai\]'"):
        load_package(package[1], runtime="coreai")
