"""What differs between coremltools 9.0 and 9.1, taken as whichever is installed writes it:
`scripts/test_coremltools VERSION` runs these with another one."""

from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ane_moe.coreml_tools import ct
from ane_moe.emit.coreml.tracing import make_template
from ane_moe.mlprogram.proto import Model_pb2
from ane_moe.mlprogram.reader import read_program
from ane_moe.placement.predicted import predict
from ane_moe.placement.published.graphs import Graph
from ane_moe.placement.targets import find_target
from ane_moe.runtime import load_package
from tests.placement.offenders import mb, save
from tests.placement.real_sizes import plan_of

FUSES_GELU = tuple(map(int, version("coremltools").split(".")[:2])) >= (9, 1)
SHAPE = (1, 64, 1, 8)
X = np.linspace(-6, 6, 512).astype(np.float16).reshape(SHAPE)
EXACT = X.astype(np.float64) / (1 + np.exp(-1.702 * X.astype(np.float64)))
# fp16, and the engine's table of 33 knots for gelu and for sigmoid (docs/runtime.md).
TOLERANCE = {"exact": 4e-3, "engine": 3e-2}


class Written(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


def converted(path: Path, module: nn.Module, **tensor) -> Path:
    example = torch.zeros(SHAPE, dtype=torch.int8 if tensor["dtype"] is np.int8 else torch.float32)
    model = ct.convert(
        torch.jit.trace(module.eval(), example),
        inputs=[ct.TensorType(name="x", shape=SHAPE, **tensor)],
        outputs=[ct.TensorType(name="y", dtype=np.float16)],
        minimum_deployment_target=ct.target.iOS26,
        skip_model_load=True,
    )
    model.save(str(path))
    return path


def kinds(path: Path) -> list[str]:
    block = read_program(path).functions["main"].block
    return [operation.type for operation in block.operations if operation.type != "const"]


def gelu(path: Path) -> Path:
    """The fused form, whatever the version."""
    return save(path, lambda x: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION", name="y"), SHAPE)


def written(path: Path) -> Path:
    """As this version converts it."""
    return converted(path, Written(), dtype=np.float16)


def test_the_version_decides_about_the_fused_form(tmp_path):
    found = kinds(written(tmp_path / "net.mlpackage"))
    assert found == (["gelu"] if FUSES_GELU else ["mul", "sigmoid", "mul"])
    assert kinds(gelu(tmp_path / "fused.mlpackage")) == ["gelu"]


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("make", [gelu, written], ids=["fused", "as converted"])
def test_both_forms_give_the_same_numbers(make, precision, tmp_path):
    options = {} if precision == "exact" else {"precision": precision}
    function = load_package(make(tmp_path / "net.mlpackage"), runtime="reference", **options)
    found = function.predict({"x": X})["y"].astype(np.float64)
    assert np.abs(found - EXACT).max() < TOLERANCE[precision]


def test_the_fused_form_is_placed_and_estimated():
    """As the study's Mac did it: legal, and priced by its bytes."""
    g = Graph(weights="fp16")
    x = g.conv(g.input("x", (1, 4096, 1, 1)), 4096)
    y = g.op("gelu", (1, 4096, 1, 1), x=x, mode="SIGMOID_APPROXIMATION")
    program = g.program(g.conv(y, 4096))
    (function,) = predict([(program, "p")], find_target("m4", 27)).functions
    assert [op.verdict for op in function.ops] == ["ane"] * 3
    assert "gelu" in {rule for op in function.ops for rule in op.rules}


def test_our_own_graphs_have_neither_gelu_nor_silu():
    """The engine's tables of both are off by more than a sigmoid's."""
    for shard in plan_of("OLMoE-1B-7B", routing="sparse").shards[:2]:
        model = Model_pb2.Model.FromString(make_template(next(iter(shard.graphs.values()))).model)
        for function in model.mlProgram.functions.values():
            block = function.block_specializations[function.opset]
            assert not {"gelu", "silu"} & {operation.type for operation in block.operations}


class Doubled(nn.Module):
    def forward(self, x):
        return x.to(torch.float16) * 2


def test_inputs_may_be_int8(tmp_path):
    """A type of OS 26; nothing of ours has it, and any package may."""
    path = converted(tmp_path / "net.mlpackage", Doubled(), dtype=np.int8)
    function = load_package(path, runtime="reference")
    assert [feature.type.dtype for feature in function.inputs] == ["int8"]
    x = np.arange(-256, 256).astype(np.int8).reshape(SHAPE)
    assert (function.predict({"x": x})["y"] == 2.0 * x.astype(np.float64)).all()
