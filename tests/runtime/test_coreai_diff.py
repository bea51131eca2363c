"""`diff` through Core AI's intermediate logger: the first operation where two programs part, by its
name in the ML Program. What needs Apple's packages is skipped without them."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil import Builder as mb
from torch import nn
from typer.testing import CliRunner

from ane_moe.cli import app
from ane_moe.coreml_tools import ct
from ane_moe.errors import UserError
from ane_moe.mlprogram.reader import read_program
from ane_moe.runtime import load_package
from ane_moe.runtime.interface import NotObserved
from ane_moe.runtime.reference.diff import Seen, Side, _Second, diff
from ane_moe.runtime.reference.tracing import describe
from tests.converted import save_converted

HAS_CORE_AI = importlib.util.find_spec("coreai_torch") is not None
pytestmark = pytest.mark.skipif(not HAS_CORE_AI, reason="Core AI's packages are not installed")


class Block(nn.Module):
    """A norm, a convolution and an attention over heads, with an epsilon and a bound to change."""

    def __init__(self, epsilon: float = 1e-5, least: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(8, 6, 1)
        self.epsilon, self.least = epsilon, least

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt((x * x).mean(1, keepdim=True) + self.epsilon)
        heads = self.convolution(x * scale).reshape(1, 2, 3, 4)
        weights = torch.softmax(heads @ heads.transpose(2, 3), -1)
        return torch.tanh((weights @ heads).clip(self.least, 2)) + 1


MUTATIONS: dict[str, dict[str, float]] = {
    "same": {},
    "epsilon": {"epsilon": 0.5},
    "bound": {"least": 0.2},
}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """An .mlpackage of a mutation, and the asset that is made of it."""
    from ane_moe.runtime.coreai.twin import save_twin

    folder, made = tmp_path_factory.mktemp("blocks"), set()

    def paths(mutation: str) -> tuple[Path, Path]:
        package, asset = (folder / f"{mutation}.{form}" for form in ("mlpackage", "aimodel"))
        if mutation not in made:
            made.add(mutation)
            save_converted(Block(**MUTATIONS[mutation]).eval(), {"x": (1, 8, 1, 4)}, package)
            program = read_program(package)
            save_twin(program, program.default_function, asset)
        return package, asset

    return paths


def test_core_ai_shows_what_each_operation_gives_by_its_name_in_the_package(packages) -> None:
    """Held to the module's own numbers, not to our runtime's."""
    asset = packages("same")[1]
    x = np.random.default_rng(0).standard_normal((1, 8, 1, 4)).astype(np.float16)
    shown: dict[str, np.ndarray] = {}
    function = load_package(asset)
    results = function.observe({"x": x}, lambda op, name, values: shown.update(values))
    block, given = Block(), torch.from_numpy(x).float()
    with torch.no_grad():
        scale = torch.rsqrt((given * given).mean(1, keepdim=True) + 1e-5)
        heads = block.convolution(given * scale).reshape(1, 2, 3, 4)
        scores = heads @ heads.transpose(2, 3)
        expected = {"scale": scale, "heads": heads, "weights": torch.softmax(scores, -1)}
        y = block(given)
    for name, value in expected.items():
        np.testing.assert_allclose(shown[f"{name}_cast_fp16"], value, atol=4e-3)
    np.testing.assert_allclose(results["y"], y, atol=4e-3)
    np.testing.assert_array_equal(shown["y"], results["y"])


def test_a_package_and_its_asset_part_nowhere_and_what_is_not_shown_is_said(packages) -> None:
    package, asset = packages("same")
    for sides in ((Side(package), Side(asset, "coreai")), (Side(asset, "coreai"), Side(package))):
        result = diff(*sides)
        assert result.same and result.parts_at is None and result.compared > 10
        assert result.worst is not None and 0 < result.worst.relative < 5e-3
    # x + epsilon + rsqrt's own epsilon become one sum, the second one's; what is summed is not
    # known to be as it was.
    assert [(item.side, item.op) for item in result.only] == [("B", "reduce_mean"), ("B", "add")]
    shown = CliRunner().invoke(app, ["diff", str(package), str(asset)])
    first, second, *_ = shown.stdout.splitlines()
    assert shown.exit_code == 0 and second.startswith("none apart; worst: ")
    hidden = "2 of A not shown by Core AI in B (1 reduce_mean, 1 add)"
    assert f", {hidden}, 0 only in B" in first


@pytest.mark.parametrize(
    "mutation, op, name", [("epsilon", "rsqrt", "scale"), ("bound", "clip", "clip_0")]
)
def test_the_operation_whose_constant_was_changed_is_found(packages, mutation, op, name) -> None:
    (package, asset), (_, other_asset) = packages("same"), packages(mutation)
    for a, b in ((package, other_asset), (asset, other_asset), (other_asset, package)):
        shown = CliRunner().invoke(app, ["diff", str(a), str(b), "--json"])
        place = json.loads(shown.stdout)["parts_at"]
        assert shown.exit_code == 1
        assert (place["op"], place["name_a"]) == (op, f"{name}_cast_fp16")


def test_a_package_is_compared_with_itself_in_core_ais_runtime(packages) -> None:
    package = packages("same")[0]
    result = diff(Side(package), Side(package, "coreai"))
    assert result.same and result.compared > 10 and result.in_part == ("B",)


def test_a_value_that_took_in_the_factor_after_it_is_not_shown_in_its_place(tmp_path: Path) -> None:
    """Core AI multiplies the weight of the convolution; coremltools' own passes are left out."""

    @mb.program(input_specs=[mb.TensorSpec((1, 4, 1, 2))], opset_version=ct.target.iOS17)
    def program(x):
        weight, factor = (np.full(shape, 3, np.float32) for shape in ((5, 4, 1, 1), (1, 5, 1, 1)))
        x = mb.conv(x=mb.tanh(x=x, name="start"), weight=weight, name="convolved")
        return mb.relu(x=mb.mul(x=x, y=factor, name="scaled"), name="y")

    path = tmp_path / "scaled.mlpackage"
    pipeline, exact = ct.PassPipeline.EMPTY, ct.precision.FLOAT32
    ct.convert(
        program,
        minimum_deployment_target=ct.target.iOS17,
        skip_model_load=True,
        compute_precision=exact,
        pass_pipeline=pipeline,
    ).save(str(path))
    result = diff(Side(path), Side(path, "coreai"), tolerance=1e-5)
    assert result.same and result.compared == 2  # the first operation and the last
    assert {item.name for item in result.only} == {"convolved", "scaled"}


def test_an_asset_is_traced(packages) -> None:
    asset = packages("same")[1]
    shown = CliRunner().invoke(app, ["run", str(asset), "--seed", "0", "--trace", "--json"])
    rows = {row["name"]: row["op"] for row in json.loads(shown.stdout)["trace"]}
    assert rows["scale_cast_fp16"] == "rsqrt" and rows["y"] == "add"


def test_an_asset_has_its_names_and_nothing_of_where_it_was_made(packages, tmp_path: Path) -> None:
    from ane_moe.runtime.coreai.twin import save_twin

    package, asset = packages("same")
    program = read_program(package)
    save_twin(program, program.default_function, tmp_path / "again.aimodel")
    content = (asset / "main.mlirb").read_bytes()
    assert (tmp_path / "again.aimodel" / "main.mlirb").read_bytes() == content
    assert b"rsqrt scale_cast_fp16" in content
    for trace in (b"origin", b".py", str(Path.cwd()).encode(), str(tmp_path.parent).encode()):
        assert trace not in content


def test_of_an_asset_without_names_the_outputs_are_compared_and_it_is_said(
    packages, tmp_path: Path
) -> None:
    from ane_moe.runtime.coreai.installed import core_ai, quiet

    assets, ir = core_ai("coreai.authoring.asset"), core_ai("coreai._compiler.ir")
    named, bare = packages("same")[1], tmp_path / "bare.aimodel"
    context = core_ai("coreai.authoring").Context()._mlir_context
    with context, quiet():
        program = assets.AIModelAsset.load(named).program
        module = ir.Module.parse(str(program))
        assets.AIProgram._from_mlir_module(module).save_asset(bare)
    result = diff(Side(named, "coreai"), Side(bare, "coreai"))
    assert result.same and result.compared == 0 and result.outputs[0].relative == 0
    shown = CliRunner().invoke(app, ["diff", str(named), str(bare)]).stdout.splitlines()
    assert shown[1].startswith("of B the outputs alone are seen: ")
    assert "does not name its operations; make the asset again" in shown[1]


def test_without_the_logger_there_is_one_line(packages, monkeypatch: pytest.MonkeyPatch) -> None:
    import coreai.runtime

    monkeypatch.delattr(coreai.runtime, "IntermediateLogger")
    package, asset = packages("same")
    traced = CliRunner().invoke(app, ["run", str(asset), "--seed", "0", "--trace"])
    assert isinstance(traced.exception, NotObserved)
    assert "shows no intermediates" in str(traced.exception)
    result = diff(Side(package), Side(asset, "coreai"))
    assert result.compared == 0 and list(result.blind) == ["B"] and result.outputs


def test_what_an_observer_raises_comes_out(packages) -> None:
    def refuse(op: str, name: str, values: object) -> None:
        raise UserError("no more of this")

    function = load_package(packages("same")[1])
    with pytest.raises(UserError, match="no more of this"):
        function.observe({"x": np.zeros((1, 8, 1, 4), np.float16)}, refuse)


def test_a_value_is_let_go_once_it_is_compared() -> None:
    side = _Second({"x": describe("add", "w", np.ones(4))}, in_part=False)
    side.note("add", "x", {"x": np.full(4, 1.5)})
    assert side.seen == [Seen("add", "x", (4,))]
    assert (side.found["x"].name_a, side.found["x"].relative) == ("w", 0.5)
