"""The Core ML runtime over coremltools' real classes and the stand-in for its native module."""

import ast
import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from ane_moe.coreml_tools import ct
from ane_moe.errors import UserError
from ane_moe.runtime import load_package
from ane_moe.runtime.coreml import runtime as coreml
from ane_moe.runtime.coreml.modelc_cache import ModelCache
from ane_moe.runtime.reference import runtime as reference
from tests.standin import install, native
from tests.standin.fixtures import standin as standin
from tests.standin.packages import CACHE, CHANNELS, FUNCTIONS, accumulator, expected, single

FP16_TOLERANCE = 0.02  # a few roundings of values up to 8


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """accumulator (decode and prefill over one state) and single (the same decode as `main`)."""
    folder = tmp_path_factory.mktemp("packages")
    return {
        "accumulator": accumulator(folder / "accumulator.mlpackage"),
        "single": single(folder / "single.mlpackage"),
    }


@pytest.fixture
def cache(tmp_path, standin):
    return ModelCache(tmp_path / "cache")


@pytest.fixture
def load(packages, cache):
    """Load without the trial in a child process."""

    def load(name="accumulator", function=None, **options):
        return coreml.load_function(packages[name], function, cache=cache, trial=False, **options)

    return load


def tokens(count, seed=0):
    return np.random.default_rng(seed).standard_normal((1, CHANNELS, 1, count)).astype(np.float16)


# -- what works
# --------------------------------------------------------------------------------------------------


def test_functions_run_over_one_state_and_equal_the_formula(load):
    decode, prefill = load(function="decode"), load(function="prefill")
    state, total = decode.make_state(), np.zeros((1, CHANNELS, 1, CACHE))
    for step, function in enumerate([prefill, decode, decode, prefill]):
        x = tokens(FUNCTIONS[function.name], step)
        y = function.predict({"x": x}, state)["y"]
        wanted, total = expected(x, total)
        assert y.dtype == np.float16
        np.testing.assert_allclose(y, wanted, atol=FP16_TOLERANCE)
    np.testing.assert_allclose(state.native.read_state("total"), total, atol=FP16_TOLERANCE)


def test_its_answers_are_the_reference_runtimes_bit_for_bit(load, packages):
    here, there = (
        load(function="prefill"),
        reference.load_function(packages["accumulator"], "prefill"),
    )
    states = here.make_state(), there.make_state()
    for seed in range(3):
        x = tokens(3, seed)
        np.testing.assert_array_equal(
            here.predict({"x": x}, states[0])["y"], there.predict({"x": x}, states[1])["y"]
        )


def test_it_describes_itself_as_the_reference_runtime_does(load, packages):
    there = reference.load_function(packages["accumulator"], "prefill")
    here = load(function="prefill")
    assert (here.name, here.inputs, here.outputs, here.states) == (
        there.name,
        there.inputs,
        there.outputs,
        there.states,
    )
    assert load().name == "decode"


def test_two_states_do_not_mix(load):
    decode, x = load(), tokens(1)
    first, second = decode.make_state(), decode.make_state()
    once = decode.predict({"x": x}, first)["y"]
    assert not np.array_equal(decode.predict({"x": x}, first)["y"], once)
    assert np.array_equal(decode.predict({"x": x}, second)["y"], once)


def test_a_package_of_one_function_loads_without_naming_it_to_core_ml(load, standin):
    function = load("single")
    assert function.name == "main" and standin.log()[-1] == "load "
    assert function.predict({"x": tokens(1)}, function.make_state())["y"].shape == (
        1,
        CHANNELS,
        1,
        1,
    )


def test_a_package_is_compiled_once_for_all_its_functions_and_processes(
    load, standin, cache, packages
):
    load(function="decode")
    load(function="prefill")
    coreml.load_function(packages["accumulator"], cache=ModelCache(cache.folder), trial=False)
    assert standin.log() == [
        "compile accumulator.mlpackage",
        "load decode",
        "load prefill",
        "load decode",
    ]


def test_the_neural_engine_is_the_default_and_other_units_can_be_named(load):
    assert load().model.compute_unit is ct.ComputeUnit.CPU_AND_NE
    assert load(units="cpu_only").model.compute_unit is ct.ComputeUnit.CPU_ONLY


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x.astype(np.float32),
        lambda x: x.astype(np.float64),
        lambda x: np.asfortranarray(x),
        lambda x: np.broadcast_to(x[..., :1], x.shape) * 0 + x,
        lambda x: x[..., ::-1][..., ::-1],
    ],
    ids=["fp32", "fp64", "fortran order", "sum of a broadcast", "negative strides"],
)
def test_inputs_of_any_float_type_and_memory_order_are_taken(load, convert):
    prefill, x = load(function="prefill"), tokens(3)
    plain = prefill.predict({"x": x}, prefill.make_state())["y"]
    np.testing.assert_array_equal(
        prefill.predict({"x": convert(x)}, prefill.make_state())["y"], plain
    )


def test_whole_numbers_are_taken_for_a_float_input(load):
    decode, x = load(), np.arange(CHANNELS).reshape(1, CHANNELS, 1, 1)
    plain = decode.predict({"x": x.astype(np.float16)}, decode.make_state())["y"]
    np.testing.assert_array_equal(decode.predict({"x": x}, decode.make_state())["y"], plain)


def test_read_only_inputs_are_taken_and_left_alone(load):
    decode = load()
    for dtype in (np.float16, np.float32):
        x = tokens(1).astype(dtype)
        x.flags.writeable = False
        before = x.copy()
        decode.predict({"x": x}, decode.make_state())
        np.testing.assert_array_equal(x, before)


# -- what the caller gets wrong
# -----------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML is there")
def test_without_core_ml_the_error_points_to_the_reference_runtime(packages, tmp_path):
    with pytest.raises(UserError, match=r"Core ML needs macOS.*--runtime reference"):
        load_package(packages["single"], runtime="coreml")


def test_a_wrong_function_name_is_an_error_that_names_the_functions(load):
    with pytest.raises(UserError, match=r"no function 'embed'.*decode, prefill"):
        load(function="embed")


def test_unknown_compute_units_are_an_error_that_names_the_known(load):
    with pytest.raises(UserError, match=r"found: npu; choose among cpu_and_ne"):
        load(units="npu")


def test_a_package_by_another_name_is_refused_before_core_ml_sees_it(
    packages, cache, tmp_path, standin
):
    shutil.copytree(packages["single"], tmp_path / "single.model")
    with pytest.raises(UserError, match=r"name it \*\.mlpackage"):
        coreml.load_function(tmp_path / "single.model", cache=cache)
    assert standin.log() == []


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "needs input 'x'"),
        ({"x": tokens(1), "z": tokens(1)}, "has no input 'z'; its inputs: x"),
        (
            {"x": tokens(2)},
            r"input 'x' .* wrong shape; found: \[1, 4, 1, 2\]; it takes \[1, 4, 1, 1\]",
        ),
        ({"x": tokens(1)[0]}, r"found: \[4, 1, 1\]"),
        ({"x": tokens(1).astype(np.int32) + 2049}, "found: int32, with"),
        ({"x": tokens(1).astype(np.complex64)}, "found: complex64"),
    ],
)
def test_inputs_that_do_not_fit_are_named(load, inputs, message):
    decode = load()
    with pytest.raises(UserError, match=message):
        decode.predict(inputs, decode.make_state())


def test_a_state_of_another_package_or_runtime_or_none_is_refused(load, packages):
    decode, x = load(), tokens(1)
    with pytest.raises(UserError, match=r"has states \(total\).*make_state"):
        decode.predict({"x": x})
    with pytest.raises(UserError, match="a state of another package"):
        decode.predict({"x": x}, load("single").make_state())
    with pytest.raises(UserError, match="found: a State"):
        decode.predict({"x": x}, reference.load_function(packages["accumulator"]).make_state())


# -- what Core ML gets wrong
# --------------------------------------------------------------------------------------


def test_a_compile_error_comes_with_core_mls_words_and_leaves_no_entry(load, standin, cache):
    standin.script(compile="error", messages={"compile": "compiler error: Encountered an error"})
    with pytest.raises(
        UserError,
        match=r"could not compile .*accumulator\.mlpackage; found: .*Encountered an error",
    ):
        load()
    assert cache.entries() == []


def test_a_load_error_comes_with_core_mls_words_and_the_usual_cause(load, standin):
    standin.script(
        load="error",
        messages={"load": "Failed to build the model execution plan, error code: -14."},
    )
    with pytest.raises(
        UserError, match=r"could not load .*error code: -14.*Neural Engine compiler refused"
    ):
        load()


def test_a_predict_error_names_the_function_and_not_more_than_one_line(load, standin):
    decode = load()
    standin.script(predict="error")
    with pytest.raises(
        UserError, match=r"could not run function 'decode'.*scripted predict error"
    ) as caught:
        decode.predict({"x": tokens(1)}, decode.make_state())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("fp32", "'y' .* was declared fp16 but computed in more; found: float32"),
        ("missing", "'y' .* is missing; found: no outputs"),
        ("misshapen", r"'y' .* is fp16 \[1, 4, 1, 1\]; found: shape \[4\]"),
    ],
)
def test_outputs_that_are_not_what_was_declared_are_errors(load, standin, fault, message):
    decode = load()
    standin.script(predict=fault)
    with pytest.raises(UserError, match=message):
        decode.predict({"x": tokens(1)}, decode.make_state())


def test_nan_and_infinity_pass_through(load):
    decode = load()
    x = tokens(1)
    x[0, 0], x[0, 1] = np.nan, np.inf
    assert np.isnan(decode.predict({"x": x}, decode.make_state())["y"]).all()


def test_damage_in_the_cache_that_sizes_do_not_show_is_compiled_away(load, standin, cache):
    load()
    (compiled,) = cache.folder.glob("models/*/model.mlmodelc")
    (model,) = compiled.rglob("*.mlmodel")
    model.write_bytes(b"\xff" * model.stat().st_size)
    assert load().predict({"x": tokens(1)}, load().make_state())["y"].dtype == np.float16
    assert standin.log().count("compile accumulator.mlpackage") == 2


def test_an_input_type_the_binding_cannot_take_is_refused_at_load(load):
    with pytest.raises(RuntimeError, match="value type not convertible"):
        load().model._proxy.predict({"x": tokens(1)}, None)
    assert "fp16" in coreml.PASSED_AS and "bool" not in coreml.PASSED_AS


# -- the stand-in itself
# ------------------------------------------------------------------------------------------


def test_coremltools_own_mlmodel_loads_predicts_and_keeps_a_state(packages, standin):
    model = ct.models.MLModel(
        str(packages["accumulator"]),
        function_name="prefill",
        compute_units=ct.ComputeUnit.CPU_AND_NE,
    )
    state, x = model.make_state(), tokens(3)
    y = model.predict({"x": x}, state)["y"]
    assert y.dtype == np.float32  # as the real binding widens
    np.testing.assert_allclose(
        y, expected(x, np.zeros((1, CHANNELS, 1, CACHE)))[0], atol=FP16_TOLERANCE
    )
    state.write_state("total", np.ones((1, CHANNELS, 1, CACHE), np.float32))
    assert (state.read_state("total") == 1).all()
    with pytest.raises(RuntimeError, match="nothing"):
        state.read_state("nothing")
    assert (
        model.load_duration_in_nano_seconds > 0 and model.last_predict_duration_in_nano_seconds > 0
    )


def test_coremltools_own_errors_surface_through_the_stand_in(packages, standin, tmp_path):
    compiled = ct.models.utils.compile_model(
        str(packages["accumulator"]), str(tmp_path / "a.mlmodelc")
    )
    with pytest.raises(RuntimeError, match="embed"):
        ct.models.CompiledMLModel(compiled, function_name="embed")
    model = ct.models.CompiledMLModel(compiled)
    with pytest.raises(
        RuntimeError, match="The input feature for total must be an MLState, but it was not"
    ):
        model.predict({"x": tokens(1)})
    other = ct.models.CompiledMLModel(ct.models.utils.compile_model(str(packages["single"])))
    with pytest.raises(RuntimeError, match="another model"):
        model.predict({"x": tokens(1)}, other.make_state())
    with pytest.raises(TypeError):
        native._State()
    asset = ct.models.model.MLModelAsset.from_path(compiled)
    assert (
        ct.models.CompiledMLModel.from_asset(asset)
        .predict({"x": tokens(1)}, model.make_state())["y"]
        .any()
    )


def test_every_import_of_the_native_module_in_coremltools_is_bound():
    root = Path(importlib.util.find_spec("coremltools").submodule_search_locations[0])
    found, asking = {}, set()
    for path in root.rglob("*.py"):
        module = ".".join(("coremltools", *path.relative_to(root).with_suffix("").parts))
        if ".test" in module or ".experimental." in module:
            continue
        text = path.read_text()
        if "libcoremlpython" not in text and "_is_macos" not in text:
            continue
        tree = ast.parse(text)
        blocks = [node for node in tree.body if isinstance(node, ast.Try)]
        for node in [
            inner for block in blocks for inner in block.body if isinstance(inner, ast.ImportFrom)
        ]:
            if node.module and node.module.endswith("libcoremlpython"):
                found.setdefault(module, set()).update(alias.name for alias in node.names)
        if any(isinstance(node, ast.Name) and node.id == "_is_macos" for node in ast.walk(tree)):
            asking.add(module)
    assert found == {module: set(names) for module, names in install.BOUND.items()}
    assert asking == set(install.ASKS_FOR_MACOS)


def plan_of(package, tmp_path, units=ct.ComputeUnit.CPU_AND_NE):
    compiled = tmp_path / "plan.mlmodelc"
    if not compiled.exists():
        ct.models.utils.compile_model(str(package), str(compiled))
    return ct.models.compute_plan.MLComputePlan.load_from_path(str(compiled), units)


def devices_of(plan):
    """{(function, operator): [device class, ...]} of every operation with a usage."""
    found = {}
    for name, function in plan.model_structure.program.functions.items():
        for operation in function.block.operations:
            usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
            assert (usage is None) == (
                plan.get_estimated_cost_for_mlprogram_operation(operation) is None
            )
            if usage is not None:
                found.setdefault((name, operation.operator_name), []).append(
                    type(usage.preferred_compute_device).__name__
                )
                assert type(usage.preferred_compute_device) in map(
                    type, usage.supported_compute_devices
                )
    return found


ENGINE, CPU, GPU = "MLNeuralEngineComputeDevice", "MLCPUComputeDevice", "MLGPUComputeDevice"


@pytest.mark.parametrize(
    ("name", "conv", "other"),
    [
        ("all_engine", ENGINE, ENGINE),
        ("conv_on_cpu", CPU, ENGINE),
        ("function_on_gpu", ENGINE, ENGINE),
        ("all_cpu", CPU, CPU),
    ],
)
def test_a_scripted_plan_reaches_coremltools_classes(
    packages, standin, tmp_path, name, conv, other
):
    standin.script(plan=name)
    found = devices_of(plan_of(packages["accumulator"], tmp_path, ct.ComputeUnit.ALL))
    assert found["decode", "ios18.conv"] == [conv]
    assert set(found["decode", "ios18.reduce_sum"]) == {other}
    assert {function for function, _ in found} == {"decode"}, (
        "a plan covers the default function only"
    )
    assert not any(operator == "const" for _, operator in found)


def test_empty_and_failing_plans_and_units_that_leave_a_device_out(packages, standin, tmp_path):
    package = packages["accumulator"]
    standin.script(plan="empty")
    assert devices_of(plan_of(package, tmp_path)) == {}
    standin.script(plan="no_program")
    assert plan_of(package, tmp_path).model_structure.program is None
    standin.script(plan="error")
    with pytest.raises(RuntimeError, match="scripted plan error"):
        plan_of(package, tmp_path)
    standin.script(plan={"default": "gpu"})
    assert {
        name for names in devices_of(plan_of(package, tmp_path)).values() for name in names
    } == {CPU}


# -- a real Mac
# --------------------------------------------------------------------------------------------------


@pytest.mark.mac
@pytest.mark.skipif(sys.platform != "darwin", reason="needs macOS and Core ML")
def test_core_ml_equals_the_reference_runtime_and_is_compiled_once(packages, tmp_path):
    cache = ModelCache(tmp_path / "cache")
    here = load_package(packages["accumulator"], "decode", "coreml", cache=cache)
    there = load_package(packages["accumulator"], "decode", "reference")
    states = here.make_state(), there.make_state()
    for seed in range(3):
        x = tokens(1, seed)
        np.testing.assert_allclose(
            here.predict({"x": x}, states[0])["y"],
            there.predict({"x": x}, states[1])["y"],
            atol=FP16_TOLERANCE,
        )
    assert [entry.good for entry in cache.entries()] == [("decode-cpu_and_ne",)]


def test_it_is_not_told_how_much_memory_weights_may_take() -> None:
    assert coreml.session_options(None, 10) == {}
    with pytest.raises(UserError, match="memory"):
        coreml.session_options(100.0, 10)
