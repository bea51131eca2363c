"""Matrices that stay as they are stored give what expanded ones give: to the bit, but for the order
of the sum of one column of fp16."""

import gc
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ane_moe.coreml_tools import ct
from ane_moe.runtime import open_package
from ane_moe.runtime.memory import Memory
from ane_moe.runtime.reference import prepare, stored_matrix, stored_source
from ane_moe.runtime.reference.stored_matrix import STEP, StoredMatrix
from ane_moe.runtime.reference.stored_rows import Made, Whole
from tests.runtime.test_compression import CASES

PLENTY = 1 << 40
INT8 = ct.optimize.coreml.OptimizationConfig(
    ct.optimize.coreml.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=0)
)
SHAPES = ((1, 1), (63, 5), (64, 64), (65, 300), (129, 31), (768, 512), (1025, 96), (640, 257))
COLUMNS = (1, 2, 3, 5, 7, 8, 13, 16, 33, 64, 100)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks in matrices of a few hundred rows."""
    monkeypatch.setattr(stored_matrix, "BLOCK_ELEMENTS", 1)


def bits(array: Any) -> np.ndarray:
    """An array by its bits: zeros of both signs differ, NaN equals itself."""
    return np.ascontiguousarray(array).view(f"u{np.asarray(array).itemsize}")


@dataclass
class Copied:
    """Rows that are expanded for each product."""

    dense: torch.Tensor

    def rows(self, first: int, last: int) -> torch.Tensor:
        return self.dense[first:last].clone()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kept", [False, True])
def test_a_product_by_blocks_of_rows_is_the_product_of_the_whole_matrix(
    shape: tuple[int, int], kept: bool, small_blocks: None
) -> None:
    torch.manual_seed(0)
    dense = torch.randn(shape).half()
    matrix = StoredMatrix(shape, Copied(dense), Memory(PLENTY if kept else 0), torch.float16)
    assert len(matrix._cuts) == max(1, shape[0] // STEP)
    for count in COLUMNS:
        columns = torch.randn(shape[1], count)
        assert torch.equal(matrix.times(columns), dense.float() @ columns)
    assert matrix.kept_bytes == (2 * dense.numel() if kept else 0)


@cache
def cut_products_are_whole(shape: tuple[int, int], count: int) -> bool:
    """Whether this processor sums a product with `count` rows alike for a matrix and for blocks of
    it, and for rows that lie as columns in memory: by torch alone, of other numbers."""
    matrix, x = torch.rand(shape), torch.rand(count, shape[1])
    cuts = StoredMatrix(shape, Copied(matrix), Memory(0), torch.float32)._cuts
    by_blocks = torch.cat([x @ matrix[first:last].T for first, last in cuts], 1)
    layouts = (x[None], x.T.contiguous().T[None])
    return all(torch.equal(by_blocks, nn.functional.linear(one, matrix)[0]) for one in layouts)


# A product with its factors the other way round is cut by columns, where MKL takes another kernel
# for the few columns of a narrow matrix: at the true size of blocks there are none.
@pytest.mark.parametrize("shape", [(64, 64), (129, 31), (4096, 256), (2049, 511), (1100, 2048)])
def test_the_product_with_rows_is_the_same_too(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    dense = torch.randn(shape)
    matrix = StoredMatrix(shape, Whole(dense.half()), Memory(0), torch.float16)
    for count in COLUMNS:
        for given_shape in ((count, shape[1]), (2, count, shape[1])):
            x = torch.randn(given_shape)
            expected = x @ dense.half().float().T
            if cut_products_are_whole(shape, count):
                assert torch.equal(matrix.applied(x), expected)
            else:
                torch.testing.assert_close(matrix.applied(x), expected, rtol=1e-5, atol=1e-3)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 200),
    columns=st.integers(1, 300),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-7, 1e-4, 1.0, 40.0, 6e3]),
    kept=st.booleans(),
    by_rows=st.booleans(),
)
def test_one_column_of_fp16_is_summed_in_fp32_and_rounded_once(
    rows: int, columns: int, seed: int, scale: float, kept: bool, by_rows: bool
) -> None:
    """Against exact sums: half a step of fp16, and what fp32 sums in any order may be off."""
    torch.manual_seed(seed)
    dense, x = (torch.randn(rows, columns) * scale).half(), torch.randn(columns).half()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored_matrix, "BLOCK_ELEMENTS", 1)
        matrix = StoredMatrix((rows, columns), Copied(dense), Memory(PLENTY * kept), torch.float16)
    y = matrix.applied(x[None]).T if by_rows else matrix.times(x[:, None])
    assert (y.dtype, y.shape) == (torch.float16, (rows, 1))
    terms = dense.double() * x.double()
    sums, off = terms.sum(1), terms.abs().sum(1) * columns * 2.0**-24
    low, high = ((sums + sign * off).float().half() for sign in (-1, 1))
    assert bool(((low <= y[:, 0]) & (y[:, 0] <= high)).all())


def test_a_column_of_fp32_is_not_rounded() -> None:
    torch.manual_seed(0)
    dense, x = torch.randn(70, 30).half(), torch.randn(30, 1)
    matrix = StoredMatrix((70, 30), Whole(dense), Memory(0), torch.float16)
    assert torch.equal(matrix.times(x), dense.float() @ x)
    assert torch.equal(matrix.applied(x.T), x.T @ dense.float().T)


class Net(nn.Module):
    """A convolution and a linear layer, of sizes that every format divides."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(96, 192, 1, bias=False)
        self.linear = nn.Linear(192, 208)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.conv(x))
        return self.linear(h.squeeze(2).transpose(1, 2))


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    torch.manual_seed(0)
    traced = torch.jit.trace(Net().eval(), torch.zeros(1, 96, 1, 4), check_trace=False)
    tokens = ct.RangeDim(1, 64, default=1)
    with warnings.catch_warnings(action="ignore"):
        return {
            name: ct.convert(
                traced,
                inputs=[ct.TensorType("x", (1, 96, 1, tokens), dtype=np.float16)],
                outputs=[ct.TensorType("y", dtype=np.float16)],
                minimum_deployment_target=target,
                compute_precision=ct.precision.FLOAT16,
                skip_model_load=True,
            )
            for name, target in (("ios16", ct.target.iOS16), ("ios18", ct.target.iOS18))
        }


# Formats whose matrices are expanded as a whole: vectors, a palette for each column (of which a byte
# holds two), and what is sparse, but for weights of which a threshold takes too few.
WHOLE = {
    "lut4_channel_scale",
    "lut4_vector2",
    "lut4_vector4_groups",
    *(case for case in CASES if case.startswith("sparse") and case != "sparse_threshold"),
}


@pytest.mark.parametrize("case", ["fp16", *CASES])
def test_every_format_gives_the_bits_of_its_dense_form(
    case: str,
    plain: dict[str, Any],
    tmp_path: Path,
    small_blocks: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target, steps = CASES.get(case, ("ios18", []))
    model = plain[target]
    with warnings.catch_warnings(action="ignore"):
        for index, (compress, config) in enumerate(steps):
            joint = {"joint_compression": True} if index else {}
            model = compress(model, ct.optimize.coreml.OptimizationConfig(config), **joint)
    path = tmp_path / "net.mlpackage"
    model.save(str(path))
    sources: list[object] = []
    monkeypatch.setattr(
        prepare, "source_of", lambda *args: sources.append(made := real(*args)) or made
    )
    real = stored_source.source_of
    functions = [open_package(path, "reference", memory=Memory(n)).function() for n in (0, PLENTY)]
    monkeypatch.setattr(prepare, "matrix_shape", lambda *_: None)
    dense = open_package(path, "reference").function()
    rng = np.random.default_rng(0)
    for tokens in (1, 5, 16, 64):
        x = rng.standard_normal((1, 96, 1, tokens)).astype(np.float16)
        expected = dense.predict({"x": x})["y"]
        results = [function.predict({"x": x})["y"] for function in functions]
        assert np.array_equal(*map(bits, results))
        # In another order of the sum some numbers are rounded elsewhere.
        if tokens == 1 or not cut_products_are_whole((208, 192), tokens):
            assert np.abs(results[0] - expected).max() <= 2**-10 * np.abs(expected).max()
        else:
            assert np.array_equal(bits(results[0]), bits(expected))
    assert len(sources) == 4  # both matrices of both functions
    assert any(isinstance(source, Made) for source in sources) == (case in WHOLE)
    kept = [sum(m.kept_bytes for m in function._matrices()) for function in functions]
    in_the_file = any(isinstance(source, Whole) for source in sources)
    assert kept == [0, 0 if in_the_file else 2 * (96 * 192 + 192 * 208)]


def test_functions_of_a_package_share_their_matrices(multifunction: Path) -> None:
    package = open_package(multifunction, "reference", memory=Memory(PLENTY))
    decode, prefill = (package.function(name, eager=True) for name in ("decode", "prefill"))
    assert decode._matrices()
    assert {id(one) for one in decode._matrices()} == {id(one) for one in prefill._matrices()}


def test_no_more_is_held_than_the_budget_says_and_dropping_gives_it_back(
    multifunction: Path,
) -> None:
    memory = Memory(PLENTY)
    function = open_package(multifunction, "reference", memory=memory).function(eager=True)
    whole = memory.kept_bytes
    assert whole == sum(matrix.nbytes for matrix in function._matrices()) <= function.held_bytes
    function.drop_weights()
    gc.collect()
    assert memory.kept_bytes == function.held_bytes == 0

    memory = Memory(whole - 1)
    function = open_package(multifunction, "reference", memory=memory).function(eager=True)
    assert 0 < memory.kept_bytes < whole
    assert memory.wanted_bytes == whole


@pytest.fixture(scope="module")
def multifunction(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two functions over the same weights of 8 bits."""
    folder = tmp_path_factory.mktemp("shared")
    torch.manual_seed(0)
    net, paths = Net().eval(), []
    description = ct.utils.MultiFunctionDescriptor()
    for name, tokens in (("decode", 1), ("prefill", 8)):
        example = torch.zeros(1, 96, 1, tokens)
        with warnings.catch_warnings(action="ignore"):
            model = ct.convert(
                torch.jit.trace(net, example, check_trace=False),
                inputs=[ct.TensorType("x", example.shape, dtype=np.float16)],
                minimum_deployment_target=ct.target.iOS18,
                skip_model_load=True,
            )
            model = ct.optimize.coreml.linear_quantize_weights(model, INT8)
        paths.append(folder / f"{name}.mlpackage")
        model.save(str(paths[-1]))
        description.add_function(str(paths[-1]), "main", name)
    description.default_function_name = "decode"
    ct.utils.save_multifunction(description, str(folder / "both.mlpackage"))
    return folder / "both.mlpackage"
