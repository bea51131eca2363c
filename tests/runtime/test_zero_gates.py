"""Experts whose gates are all zero are left out, and not a bit of the result changes."""

import itertools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ane_moe.coreml_tools import ct
from ane_moe.model.spec import MlpSpec
from ane_moe.parts.experts import tree_sum
from ane_moe.parts.mlp import GatedMlp
from ane_moe.runtime import load_package
from ane_moe.runtime.reference.engine.arithmetic import Engine
from ane_moe.runtime.reference.stored_matrix import StoredMatrix

D, WIDTH, EXPERTS = 48, 80, 6
PRODUCTS = 3  # of an expert


class Experts(nn.Module):
    """Experts as the parts have them, of gates that are given; one of two factors."""

    def __init__(self) -> None:
        super().__init__()
        ranks = [(0, 0, 0)] * (EXPERTS - 1) + [(4, 4, 0)]
        self.experts = nn.ModuleList(GatedMlp(D, MlpSpec(WIDTH), rank) for rank in ranks)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        parts = [expert(x, gates[:, e : e + 1]) for e, expert in enumerate(self.experts)]
        return tree_sum(parts)


class One(Experts):
    """What one expert gives is the result."""

    def forward(self, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.experts[0](x, gates[:, :1])
        return y


def converted(net: nn.Module, tokens: int, path: Path) -> Any:
    shapes = {"x": (1, D, 1, tokens), "gates": (1, EXPERTS, 1, tokens)}
    traced = torch.jit.trace(
        net.eval(), tuple(torch.zeros(shape) for shape in shapes.values()), check_trace=False
    )
    with warnings.catch_warnings(action="ignore"):
        ct.convert(
            traced,
            inputs=[ct.TensorType(n, shape, dtype=np.float16) for n, shape in shapes.items()],
            outputs=[ct.TensorType("y", dtype=np.float16)],
            minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
        ).save(str(path))
    return load_package(path, runtime="reference")


@pytest.fixture(scope="module")
def by_engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Experts in the engine's arithmetic, of five tokens."""
    torch.manual_seed(0)
    converted(Experts(), 5, path := tmp_path_factory.mktemp("engine") / "experts.mlpackage")
    return load_package(path, runtime="reference", precision="engine")


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Any]:
    """By the sign of the weights and tokens: with weights of one sign all products can be -0."""
    folder, made = tmp_path_factory.mktemp("experts"), {}
    for kind, (sign, tokens) in itertools.product((Experts, One), itertools.product("±+-", (1, 5))):
        torch.manual_seed(0)
        net = kind()
        for parameter in net.parameters():
            if sign != "±":
                parameter.data = parameter.data.abs() * float(f"{sign}1")
        name = f"{kind.__name__}{sign}"
        made[name, tokens] = converted(net, tokens, folder / f"{name}{tokens}.mlpackage")
    return made


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint16)


def products(function: Any, inputs: dict[str, np.ndarray]) -> int:
    """Products that a call makes."""
    count, times = 0, StoredMatrix.times

    def counted(self: StoredMatrix, columns: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        return times(self, columns)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoredMatrix, "times", counted)
        function.predict(inputs)
    return count


GATES = st.sampled_from(
    [0.0, -0.0, 0.0, -0.0, 0.25, 1.0, -0.5, 6e-8, 65504.0, float("nan"), float("inf")]
)
SCALES = st.sampled_from([0.0, 6e-8, 1e-3, 1.0, 5.0, 60.0, 3e3, 6e4, float("inf")])


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**31), scale=SCALES)
def test_not_a_bit_changes(
    functions: dict[tuple[str, int], Any],
    by_engine: Any,
    data: st.DataObject,
    seed: int,
    scale: float,
) -> None:
    rng = np.random.default_rng(seed)
    np.seterr(all="ignore")
    for (_, tokens), function in (*functions.items(), (("", 5), by_engine)):
        x = (rng.standard_normal((1, D, 1, tokens)) * scale).astype(np.float16)
        gates = data.draw(st.lists(GATES, min_size=EXPERTS, max_size=EXPERTS))
        by_token = np.repeat(np.array(gates, np.float16), tokens).reshape(1, EXPERTS, 1, tokens)
        by_token[:, :, :, 1:] *= rng.integers(0, 2, (1, EXPERTS, 1, tokens - 1)).astype(np.float16)
        inputs = {"x": x, "gates": by_token}
        everything = function.observe(inputs, lambda *_: None)["y"]
        for _ in range(3):
            assert np.array_equal(bits(function.predict(inputs)["y"]), bits(everything))


def inputs_of(tokens: int, chosen: set[int], scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    gates = np.zeros((1, EXPERTS, 1, tokens), np.float16)
    for token, expert in enumerate(chosen):
        gates[0, expert, 0, token % tokens] = 0.5
    x = (scale * rng.standard_normal((1, D, 1, tokens))).astype(np.float16)
    return {"x": x, "gates": gates}


@pytest.mark.parametrize("tokens", [1, 5])
def test_only_chosen_experts_are_computed_once_their_weights_are_known(
    functions: dict[tuple[str, int], Any], tokens: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    function = converted(Experts(), tokens, tmp_path / "new.mlpackage")
    all_products = PRODUCTS * EXPERTS + 4
    assert products(function, inputs_of(tokens, {1})) == all_products  # the first call measures
    assert products(function, inputs_of(tokens, {1})) == PRODUCTS
    assert products(function, inputs_of(tokens, {5})) == PRODUCTS + 4
    assert products(function, inputs_of(tokens, set())) == 0
    if tokens > 1:
        assert products(function, inputs_of(tokens, {0, 2})) == 2 * PRODUCTS


def columns(function: Any, inputs: dict[str, np.ndarray]) -> int:
    """Columns that a call multiplies in the engine's arithmetic."""
    count, dot = 0, Engine._dot

    def counted(self: Engine, w: torch.Tensor, x: torch.Tensor, start: None) -> torch.Tensor:
        nonlocal count
        count += x.shape[1]
        return dot(self, w, x, start)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "_dot", counted)
        function.predict(inputs)
    return count


def test_the_engines_arithmetic_takes_the_time_of_the_tokens_that_chose(by_engine: Any) -> None:
    assert columns(by_engine, inputs_of(5, {0, 2, 3})) == 3 * PRODUCTS
    assert columns(by_engine, inputs_of(5, set())) == 0
    # Sums of the others could overflow, which the engine does not take back.
    everything = inputs_of(5, {0}, scale=6e3)
    assert columns(by_engine, everything) > 5 * (2 * EXPERTS - 1)


def test_everything_is_computed_where_a_hidden_number_could_overflow(
    functions: dict[tuple[str, int], Any],
) -> None:
    function, inputs = functions["Experts±", 1], inputs_of(1, {1}, scale=6e3)
    function.predict(inputs)
    assert products(function, inputs) == PRODUCTS * EXPERTS + 4
    # An infinite hidden number times a gate of zero is no number, and reaches the result.
    assert np.isnan(function.predict(inputs)["y"]).any()


def test_weights_that_are_not_finite_leave_nothing_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Experts()
    net.experts[3].down.weight.data[7, 9] = float("inf")
    function, inputs = converted(net, 1, tmp_path / "inf.mlpackage"), inputs_of(1, {1})
    for _ in range(2):
        assert np.isnan(function.predict(inputs)["y"][0, 7]).all()
    assert products(function, inputs) == 2 * PRODUCTS


def test_observers_see_everything(functions: dict[tuple[str, int], Any]) -> None:
    function, inputs, seen = functions["Experts±", 1], inputs_of(1, {1}), []
    for _ in range(3):
        function.predict(inputs)
    function.observe(inputs, lambda op, name, outputs: seen.append(op))
    assert seen.count("conv") == PRODUCTS * EXPERTS + 4


def test_partial_sums_in_fp16_leave_nothing_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    converted(Experts(), 1, path := tmp_path / "narrow.mlpackage")
    narrow, inputs = load_package(path, runtime="reference", precision="fp16"), inputs_of(1, {1})
    assert narrow._plan.lean.steps == [*narrow._plan.steps.steps]
    narrow.predict(inputs)
