"""Packages of many copies of one template: what coremltools loads, and what its own
`save_multifunction` makes."""

import numpy as np
import pytest
import torch
from coremltools.converters.mil.frontend.milproto.load import load

from ane_moe.coreml_tools import ct
from ane_moe.emit.coreml.package import WEIGHTS, ContentKey, stamp
from ane_moe.emit.coreml.template import value_name
from ane_moe.emit.coreml.tracing import make_template
from ane_moe.mlprogram.reader import read_program
from ane_moe.model.experts import ExpertGroupConfig
from ane_moe.model.port import shapes_of
from ane_moe.model.spec import MlpSpec
from ane_moe.model.template_key import TemplateKey, weight_name
from ane_moe.parts.unbound import build_unbound
from ane_moe.runtime import open_package
from tests.converted import save_converted

D_MODEL, WIDTH, EXPERTS, BUCKETS = 24, 20, 3, (1, 4)
CONFIG = ExpertGroupConfig(D_MODEL, MlpSpec(WIDTH))


@pytest.fixture(scope="module")
def template():
    return make_template(TemplateKey(CONFIG, tuple((f"t{tokens}", tokens) for tokens in BUCKETS)))


@pytest.fixture(scope="module")
def weights(template):
    rng = np.random.default_rng(0)
    return {
        f"expert_{e:03d}": {
            name: (rng.standard_normal(shape) / 4).astype(np.float16)
            for name, shape in template.weights.items()
        }
        for e in range(EXPERTS)
    }


@pytest.fixture(scope="module")
def ours(template, weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("ours") / "layer_00.mlpackage"
    values = (
        (weight_name(prefix, name), value)
        for prefix, held in weights.items()
        for name, value in held.items()
    )
    stamp(dict.fromkeys(weights, template), values, ContentKey("x"), path)
    return path


@pytest.fixture(scope="module")
def theirs(weights, tmp_path_factory):
    """The same experts, each converted with its weights inside, joined by `save_multifunction`."""
    folder = tmp_path_factory.mktemp("theirs")
    description = ct.utils.MultiFunctionDescriptor()
    for prefix, held in weights.items():
        block = build_unbound(CONFIG).to_empty(device="cpu").eval()
        block.load_state_dict(
            {name: torch.from_numpy(value).float() for name, value in held.items()}
        )
        for tokens in BUCKETS:
            inputs = shapes_of(block.ports(tokens).inputs)
            part = folder / f"{prefix}_{tokens}.mlpackage"
            save_converted(Positional(block, tuple(inputs)), inputs, part)
            description.add_function(str(part), "main", f"{prefix}_t{tokens}")
    description.default_function_name = "expert_000_t1"
    ct.utils.save_multifunction(description, str(folder / "joined.mlpackage"))
    return folder / "joined.mlpackage"


class Positional(torch.nn.Module):
    def __init__(self, block, names):
        super().__init__()
        self.block, self.names = block, names

    def forward(self, *values):
        return self.block(**dict(zip(self.names, values, strict=True)))["y"]


def test_coremltools_loads_it_and_finds_each_experts_own_weights(ours, weights):
    model = ct.models.MLModel(str(ours), skip_model_load=True)
    program = load(model.get_spec(), specification_version=9, file_weights_dir=model.weights_dir)
    assert set(program.functions) == {
        f"{prefix}_t{tokens}" for prefix in weights for tokens in BUCKETS
    }
    for name, function in program.functions.items():
        constants = {
            op.outputs[0].name: op.outputs[0].val
            for op in function.operations
            if op.op_type == "const"
        }
        for weight, value in weights[name.rpartition("_")[0]].items():
            np.testing.assert_array_equal(constants[value_name(weight)], value)


def test_weights_are_written_once_for_all_token_counts(ours, weights):
    stored = sum(value.nbytes for held in weights.values() for value in held.values())
    count = sum(map(len, weights.values()))
    assert stored < (ours / WEIGHTS).stat().st_size <= stored + 128 * count + 64


def test_it_equals_what_save_multifunction_makes_function_by_function(ours, theirs):
    a, b = read_program(ours), read_program(theirs)
    assert a.functions.keys() == b.functions.keys() and a.default_function == b.default_function
    rng = np.random.default_rng(1)
    opened = [open_package(path, "reference") for path in (ours, theirs)]
    for name in a.functions:
        assert a.interfaces[name].inputs == b.interfaces[name].inputs
        assert a.interfaces[name].outputs == b.interfaces[name].outputs
        assert computing(a.functions[name]) == computing(b.functions[name])
        inputs = {
            feature.name: rng.standard_normal(feature.type.shape).astype(np.float16)
            for feature in a.interfaces[name].inputs
        }
        mine, other = (package.function(name).predict(inputs)["y"] for package in opened)
        np.testing.assert_array_equal(mine, other)


def computing(function):
    return [op.type for op in function.block.operations if op.type != "const"]
