"""The executor: inputs, outputs, states, functions, control flow, and errors that name what is
wrong."""

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import get_new_symbol, types

from ane_moe.coreml_tools import ct
from ane_moe.errors import UserError
from ane_moe.mlprogram.program import (
    Argument,
    Block,
    Constant,
    DictionaryType,
    Feature,
    Function,
    Interface,
    ListType,
    Operation,
    Output,
    Program,
    StateType,
    TensorType,
    VariadicType,
)
from ane_moe.mlprogram.reader import read_program
from ane_moe.mlprogram.values import describe
from ane_moe.runtime import load_package, resolve_runtime
from ane_moe.runtime.reference import structural
from ane_moe.runtime.reference.runtime import ReferenceFunction
from ane_moe.runtime.reference.tracing import trace

Get = Callable[[str], Path]
X = np.random.default_rng(0).standard_normal((1, 8, 1, 4)).astype(np.float32)


def save(program: object, path: Path, target: object = ct.target.iOS18, **options: object) -> Path:
    model = ct.convert(
        program,
        minimum_deployment_target=target,
        skip_model_load=True,
        compute_precision=ct.precision.FLOAT32,
        **options,
    )
    model.save(str(path))
    return path


def hand_made(
    operations: list[Operation],
    inputs: dict[str, TensorType | StateType],
    outputs: dict[str, TensorType],
) -> ReferenceFunction:
    """A function that no converter would write."""
    declared = tuple(Output(name, kind) for name, kind in inputs.items())
    block = Block((), tuple(operations), tuple(outputs))
    interface = Interface(
        tuple(Feature(name, kind) for name, kind in inputs.items() if isinstance(kind, TensorType)),
        tuple(Feature(name, kind) for name, kind in outputs.items()),
        tuple(
            Feature(name, kind.tensor)
            for name, kind in inputs.items()
            if isinstance(kind, StateType)
        ),
    )
    program = Program(
        Path("made"),
        {"main": Function("main", "CoreML8", declared, block)},
        {"main": interface},
        "main",
        9,
        {},
    )
    return ReferenceFunction(program, "main")


def op(
    kind: str, output: str, declared: TensorType, **inputs: Argument | tuple[Argument, ...]
) -> Operation:
    arguments = {
        name: value if isinstance(value, tuple) else (value,) for name, value in inputs.items()
    }
    return Operation(kind, output, arguments, (Output(output, declared),))


FP16 = TensorType("fp16", (2,))


def run_add(given: dict, declared: TensorType = FP16) -> np.ndarray:
    function = hand_made([op("add", "y", declared, x="x", y="x")], {"x": declared}, {"y": declared})
    return function.predict(given)["y"]


# ---- inputs and outputs


def test_floats_are_cast_to_the_declared_type_and_outputs_are_of_it() -> None:
    for dtype in (np.float16, np.float32, np.float64):
        out = run_add({"x": np.array([1, 2], dtype)})
        assert out.dtype == np.float16 and out.tolist() == [2, 4]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"z": np.zeros(2, np.float16)}, "has no input 'z'; its inputs: x"),
        ({}, "needs input 'x'; found: inputs: none"),
        (
            {"x": np.zeros(3, np.float16)},
            r"input 'x' of function 'main' has the wrong shape; found: \[3\]; it takes \[2\]",
        ),
        (
            {"x": np.array([2049, 0])},
            r"wrong element type; found: int64, with 2049 .*numpy\.float16",
        ),
        ({"x": np.zeros(2, np.bool_)}, "wrong element type; found: bool"),
    ],
)
def test_an_input_that_does_not_fit_is_one_clear_error(given: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_add(given)


def test_arrays_of_any_layout_are_taken() -> None:
    declared = TensorType("fp32", (2, 3))
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    for given in (
        np.asfortranarray(x),
        x[::-1, ::-1][::-1, ::-1],
        x.astype(">f4"),
        np.broadcast_to(x, (2, 3)),
    ):
        given.setflags(write=False)
        assert np.array_equal(run_add({"x": given}, declared), x * 2)


def test_nan_and_infinity_pass_through() -> None:
    out = run_add({"x": np.array([np.nan, np.inf], np.float32)})
    assert np.isnan(out[0]) and np.isinf(out[1])


def test_outputs_never_share_memory_with_inputs_weights_or_states() -> None:
    x = np.zeros(2, np.float16)
    constant = Constant(FP16, lambda: np.ones(2, np.float16), nbytes=4)
    const = Operation("const", "c", {}, (Output("c", FP16),), (), {"val": constant})
    function = hand_made(
        [
            const,
            op("identity", "y", FP16, x="x"),
            op("identity", "z", FP16, x="c"),
            op("read_state", "s", FP16, input="state"),
        ],
        {"x": FP16, "state": StateType(FP16)},
        {"y": FP16, "z": FP16, "s": FP16},
    )
    state = function.make_state()
    for array in function.predict({"x": x}, state).values():
        array += 5
    again = function.predict({"x": x}, state)
    assert x.tolist() == [0, 0] and again["z"].tolist() == [1, 1] and again["s"].tolist() == [0, 0]


def test_a_flexible_package_takes_its_range_and_nothing_else(package: Get) -> None:
    function = load_package(package("flexible"), runtime="reference")
    whole = function.predict({"x": X})["y"]
    for tokens in (1, 3, 4):
        part = function.predict({"x": X[..., :tokens]})["y"]
        np.testing.assert_allclose(part, whole[..., :tokens], atol=2e-3)
    with pytest.raises(UserError, match=r"wrong shape; found: \[1, 8, 1, 17\]"):
        function.predict({"x": np.zeros((1, 8, 1, 17), np.float32)})


def test_a_package_of_enumerated_shapes_takes_those_alone(package: Get) -> None:
    function = load_package(package("enumerated"), runtime="reference")
    assert function.predict({"x": X[..., :1]})["y"].shape == (1, 16, 1, 1)
    with pytest.raises(UserError, match="wrong shape"):
        function.predict({"x": X[..., :2]})


# ---- states


def test_a_state_is_carried_from_call_to_call_and_a_fresh_one_starts_at_zero(package: Get) -> None:
    function = load_package(package("stateful"), runtime="reference")
    (name,) = (feature.name for feature in function.inputs)
    x = np.ones((1, 4), np.float16)
    state = function.make_state()
    totals = [
        float(next(iter(function.predict({name: x}, state).values()))[0, 0]) for _ in range(3)
    ]
    assert totals == [2, 4, 6]
    assert state.read("total").tolist() == [[3, 3, 3, 3]]
    assert float(next(iter(function.predict({name: x}, function.make_state()).values()))[0, 0]) == 2


def test_a_function_with_states_asks_for_one_that_fits(package: Get) -> None:
    function = load_package(package("stateful"), runtime="reference")
    inputs = {function.inputs[0].name: np.ones((1, 4), np.float16)}
    with pytest.raises(UserError, match=r"needs a state; make one with make_state\(\)"):
        function.predict(inputs)
    with pytest.raises(UserError, match="state is of another runtime"):
        function.predict(inputs, {"total": np.zeros((1, 4))})
    wrong = function.make_state()
    wrong.tensors["total"] = torch.zeros(2, 4, dtype=torch.float16)
    with pytest.raises(UserError, match=r"state does not fit.*total: \[2, 4\]"):
        function.predict(inputs, wrong)


def test_a_state_written_from_an_input_does_not_follow_the_callers_array() -> None:
    function = hand_made(
        [
            Operation("write_state", "w", {"input": ("state",), "data": ("x",)}, ()),
            op("read_state", "y", FP16, input="state"),
        ],
        {"x": FP16, "state": StateType(FP16)},
        {"y": FP16},
    )
    x, state = np.array([1, 2], np.float16), function.make_state()
    function.predict({"x": x}, state)
    x[:] = 9
    assert state.read("state").tolist() == [1, 2]


class Attention(torch.nn.Module):
    """One head over a cache of 32 positions; `write` is one-hot at the position of the token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.q, self.k, self.v = (torch.nn.Linear(16, 16, bias=False) for _ in range(3))
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros(32, 16, dtype=torch.float16))

    def forward(self, x: torch.Tensor, write: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        self.k_cache[:] = self.k_cache * (1 - write) + self.k(x) * write
        self.v_cache[:] = self.v_cache * (1 - write) + self.v(x) * write
        return torch.softmax(self.q(x) @ self.k_cache.T * 0.25 + mask, -1) @ self.v_cache


def test_a_stateful_decoder_steps_token_by_token_like_attention_over_the_whole_text(
    tmp_path: Path,
) -> None:
    module = Attention().half().eval()
    shapes = {"x": (1, 16), "write": (32, 1), "mask": (1, 32)}
    with torch.no_grad():
        traced = torch.jit.trace(
            module,
            tuple(torch.zeros(s, dtype=torch.float16) for s in shapes.values()),
            check_trace=False,
        )
    model = ct.convert(
        traced,
        inputs=[ct.TensorType(name, shape, np.float16) for name, shape in shapes.items()],
        outputs=[ct.TensorType("y", dtype=np.float16)],
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
        states=[
            ct.StateType(ct.TensorType(shape=(32, 16), dtype=np.float16), name=n)
            for n in ("k_cache", "v_cache")
        ],
    )
    model.save(str(tmp_path / "attention.mlpackage"))
    function = load_package(tmp_path / "attention.mlpackage", runtime="reference")
    text = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        q, k, v = (layer.float()(text) for layer in (module.q, module.k, module.v))
        scores = (q @ k.T * 0.25).masked_fill(torch.ones(20, 20).triu(1).bool(), -torch.inf)
        expected = (torch.softmax(scores, -1) @ v).numpy()
    state = function.make_state()
    for position, token in enumerate(text):
        write = np.zeros((32, 1), np.float16)
        write[position] = 1
        mask = np.where(np.arange(32) <= position, 0, -1e4).astype(np.float16)[None]
        out = function.predict({"x": token.numpy()[None], "write": write, "mask": mask}, state)["y"]
        np.testing.assert_allclose(out[0], expected[position], atol=4e-3)


# ---- functions and weights


def test_each_function_of_a_package_runs_and_the_default_is_the_declared_one(package: Get) -> None:
    path = package("multifunction")
    single, many = (load_package(path, name, "reference") for name in ("decode", "prefill"))
    whole = many.predict({"x": X})["y"]
    for token in range(4):
        out = single.predict({"x": X[..., token : token + 1]})["y"]
        np.testing.assert_allclose(out, whole[..., token : token + 1], atol=2e-3)
    assert load_package(path, runtime="reference").inputs[0].type.shape == (1, 8, 1, 1)
    with pytest.raises(UserError, match=r"no function 'other'.*its functions: decode, prefill"):
        load_package(path, "other", "reference")


def counted(program: Program) -> tuple[Program, list[str]]:
    """`program`, noting each constant of the weight file that is read."""
    reads: list[str] = []

    def note(constant: Constant, name: str) -> Constant:
        def load() -> object:
            reads.append(name)
            return constant.load()

        return replace(constant, load=load) if constant.blob is not None else constant

    def function(declared: Function) -> Function:
        operations = tuple(
            replace(
                one,
                attributes={
                    key: note(value, f"{declared.name}/{one.name}")
                    for key, value in one.attributes.items()
                },
            )
            for one in declared.block.operations
        )
        return replace(declared, block=replace(declared.block, operations=operations))

    return replace(
        program, functions={name: function(one) for name, one in program.functions.items()}
    ), reads


def test_weights_are_read_at_the_first_call_once_and_only_for_the_function_that_runs(
    package: Get,
) -> None:
    program, reads = counted(read_program(package("multifunction")))
    decode, _ = (ReferenceFunction(program, name) for name in ("decode", "prefill"))
    assert not reads
    first = decode.predict({"x": X[..., :1]})["y"]
    assert (
        reads
        and all(name.startswith("decode/") for name in reads)
        and len(set(reads)) == len(reads)
    )
    count = len(reads)
    decode.predict({"x": X[..., :1]})
    assert len(reads) == count
    decode.drop_weights()
    assert np.array_equal(decode.predict({"x": X[..., :1]})["y"], first)
    assert len(reads) == 2 * count


def test_opening_a_package_does_not_import_torch_or_coremltools() -> None:
    code = (
        "import sys; import ane_moe.runtime; "
        "assert not {'torch', 'coremltools', 'transformers'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_runtimes_have_names() -> None:
    assert resolve_runtime("auto") == ("coreml" if sys.platform == "darwin" else "reference")
    with pytest.raises(
        UserError, match=r"Unknown runtime; found: gpu; choose one of: auto, reference, coreml"
    ):
        resolve_runtime("gpu")
    with pytest.raises(UserError, match="unknown precision; found: fp8"):
        ReferenceFunction(read_program_of_one_op(), "main", "fp8")  # type: ignore[arg-type]


def read_program_of_one_op() -> Program:
    return hand_made([op("relu", "y", FP16, x="x")], {"x": FP16}, {"y": FP16}).program


# ---- control flow


def test_loops_and_branches_run_as_written(package: Get) -> None:
    function = load_package(package("loop"), runtime="reference")

    def by_hand(x: np.ndarray) -> np.ndarray:
        while x.sum() < 100:
            x = x + x
        return x - 1 if x.sum() > 150 else x + 1

    for start in (1.0, 10.0, 20.0, 45.0):
        x = np.full((1, 4), start, np.float32)
        assert np.array_equal(function.predict({"x": x})["y"], by_hand(x))


def test_blocks_see_what_is_around_them_and_nest(tmp_path: Path) -> None:
    inputs = [mb.TensorSpec((3,)), mb.TensorSpec((1,), dtype=types.int32)]

    @mb.program(input_specs=inputs, opset_version=ct.target.iOS17)
    def program(x, n):
        scale = mb.mul(x=x, y=np.float32(2))

        def body(i, total):
            even = mb.squeeze(x=mb.equal(x=mb.mod(x=i, y=np.int32(2)), y=np.int32(0)), axes=[0])
            step = mb.cond(
                pred=even,
                _true_fn=lambda: mb.add(x=scale, y=np.float32(1)),
                _false_fn=lambda: mb.identity(x=x),
            )
            return mb.add(x=i, y=np.int32(1)), mb.add(x=total, y=step)

        zero = mb.sub(x=n, y=n)
        _, total = mb.while_loop(
            _cond=lambda i, total: mb.squeeze(x=mb.less(x=i, y=n), axes=[0]),
            _body=body,
            loop_vars=(zero, mb.mul(x=x, y=np.float32(0))),
        )
        return total

    path = save(program, tmp_path / "nested.mlpackage", ct.target.iOS17)
    function = load_package(path, runtime="reference")
    names = [feature.name for feature in function.inputs]
    x = np.array([1, 2, 3], np.float32)
    for count in (0, 1, 4, 5):
        out = function.predict(dict(zip(names, (x, np.array([count], np.int32)), strict=True)))
        expected = ((count + 1) // 2) * (2 * x + 1) + (count // 2) * x
        assert np.array_equal(next(iter(out.values())), expected)


# ---- labels


class Classifier(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.linear(x), -1)


@pytest.mark.parametrize("labels", [["cat", "dog", "bird"], [10, -20, 2**40]])
@pytest.mark.parametrize("precision", [ct.precision.FLOAT16, ct.precision.FLOAT32])
def test_a_classifier_gives_the_likeliest_label_and_the_probability_of_each(
    labels: list, precision: object, tmp_path: Path
) -> None:
    x = torch.tensor([[0.5, -1, 2, 0]])
    module = Classifier().eval()
    config = ct.ClassifierConfig(labels, predicted_feature_name="what")
    model = ct.convert(
        torch.jit.trace(module, x),
        inputs=[ct.TensorType("x", shape=x.shape)],
        classifier_config=config,
        minimum_deployment_target=ct.target.iOS16,
        compute_precision=precision,
        skip_model_load=True,
    )
    model.save(str(tmp_path / "c.mlpackage"))
    function = load_package(tmp_path / "c.mlpackage", runtime="reference")
    out = function.predict({"x": x.numpy()})
    with torch.no_grad():
        expected = dict(zip(labels, module(x)[0].tolist(), strict=True))
    label, probabilities = out["what"], out["what_probs"]
    assert label == max(expected, key=expected.__getitem__) and type(label) is type(labels[0])
    assert list(probabilities) == labels
    assert {type(value) for value in probabilities.values()} == {float}
    np.testing.assert_allclose(list(probabilities.values()), list(expected.values()), atol=2e-3)
    traced = trace(function, {"x": x.numpy()})
    assert traced.results == out and "classify" not in [value.op for value in traced.values]


def test_a_classifier_with_another_number_of_labels_is_refused() -> None:
    text = TensorType("string", ())
    labels = Constant(ListType(text, 2), lambda: ("a", "b"))
    kinds = (text, DictionaryType(text, TensorType("fp64", ())))
    outputs = tuple(Output(name, kind) for name, kind in zip(("label", "all"), kinds, strict=True))
    wide = TensorType("fp32", (3,))
    classify = Operation("classify", "c", {"probabilities": ("x",), "classes": (labels,)}, outputs)
    block = Block((), (classify,), ("label", "all"))
    function = Function("main", "CoreML8", (Output("x", wide),), block)
    interface = Interface((Feature("x", wide),), ())
    program = Program(Path("made"), {"main": function}, {"main": interface}, "main", 9, {})
    with pytest.raises(UserError, match=r"op classify 'c' in function 'main': .*found: 3 for 2"):
        ReferenceFunction(program, "main").predict({"x": np.zeros(3, np.float32)})


# ---- values of unknown size


def test_a_squeezed_axis_of_unknown_size_is_gone_though_the_program_declares_it(
    tmp_path: Path,
) -> None:
    """coremltools infers [?, ?] for the squeeze of a [?, ?], and Core ML runs it."""
    inputs = [mb.TensorSpec((4, 3)), *(mb.TensorSpec((2,), dtype=types.int32) for _ in range(2))]

    @mb.program(input_specs=inputs, opset_version=ct.target.iOS16)
    def program(x, begin, end):
        row = mb.squeeze(x=mb.slice_by_index(x=x, begin=begin, end=end), axes=[0], name="row")
        return mb.reshape(x=mb.add(x=row, y=np.float32(1)), shape=[2, 1])

    path = save(program, tmp_path / "squeeze.mlpackage", ct.target.iOS16)
    function = load_package(path, runtime="reference")
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    begin, end = np.array([1, 0], np.int32), np.array([2, 2], np.int32)
    (out,) = function.predict({"x": x, "begin": begin, "end": end}).values()
    assert out.tolist() == [[4], [5]]


@pytest.mark.parametrize(
    "declared, shape, fits",
    [
        ((None, None), (2,), True),
        ((None, None), (2, 3), True),
        ((None, 4), (4,), True),
        ((4, None, 3), (4, 3), True),
        ((None, 4), (3,), False),
        ((4, None, 3), (4, 2), False),
        ((None,), (2, 3), False),
        ((4, 3), (3,), False),
        ((1, 3), (3,), False),
        ((None, 4), (4, 4, 4), False),
    ],
)
def test_what_is_known_of_a_shape_is_compared_and_an_unknown_size_may_be_absent(
    declared: tuple, shape: tuple, fits: bool
) -> None:
    flat, kind = TensorType("fp16", (math.prod(shape),)), TensorType("fp16", declared)
    reshape = op("reshape", "y", kind, x="x", shape=numbers(shape))
    function = hand_made([reshape], {"x": flat}, {"y": kind})
    x = {"x": np.zeros(math.prod(shape), np.float16)}
    if fits:
        assert function.predict(x)["y"].shape == shape
        return
    with pytest.raises(UserError, match=r"op reshape 'y'.*another shape than declared") as error:
        function.predict(x)
    assert "None" not in str(error.value)


def test_a_result_of_unknown_rank_may_have_any(tmp_path: Path) -> None:
    count = ct.RangeDim(1, 4, default=2)

    inputs = [mb.TensorSpec((6,)), mb.TensorSpec((get_new_symbol(),), dtype=types.int32)]

    @mb.program(input_specs=inputs, opset_version=ct.target.iOS17)
    def program(x, shape):
        return mb.reshape(x=mb.abs(x=mb.reshape(x=x, shape=shape)), shape=[-1])

    path = save(
        program,
        tmp_path / "rank.mlpackage",
        ct.target.iOS17,
        inputs=[
            ct.TensorType("x", shape=(6,)),
            ct.TensorType("shape", shape=(count,), dtype=np.int32),
        ],
    )
    declared = read_program(path).functions["main"].block.operations[0].outputs[0].type
    assert isinstance(declared, VariadicType) and describe(declared) == "fp32[...]"
    function = load_package(path, runtime="reference")
    x = -np.arange(6, dtype=np.float32)
    for shape in ([6], [2, 3], [1, 3, 2, 1]):
        (out,) = function.predict({"x": x, "shape": np.array(shape, np.int32)}).values()
        assert out.tolist() == [0, 1, 2, 3, 4, 5]


def numbers(values: tuple[int, ...]) -> Constant:
    array = np.array(values, np.int32)
    return Constant(TensorType("int32", array.shape), lambda: array, nbytes=array.nbytes)


# ---- precision


def test_fp16_arithmetic_narrows_parameters_too(tmp_path: Path) -> None:
    """log's epsilon of 1e-45 is 0 in fp16, and log(softmax(x)) -inf, as on the engine.

    coremltools 2728 reports it.
    """

    @mb.program(input_specs=[mb.TensorSpec((1, 4))], opset_version=ct.target.iOS17)
    def program(x):
        return mb.log(x=mb.softmax(x=x, axis=-1), name="given"), mb.rsqrt(x=x, name="default")

    path = save(program, tmp_path / "log.mlpackage", ct.target.iOS17)
    x = {"x": np.array([[0, 0, 0, 200]], np.float32)}
    wide, narrow = (
        load_package(path, runtime="reference", precision=precision).predict(x)
        for precision in ("fp32", "fp16")
    )
    np.testing.assert_allclose(wide["given"], [[np.log(np.float32(1e-45))] * 3 + [0]], rtol=1e-5)
    assert narrow["given"].tolist() == [[-np.inf] * 3 + [0]]
    assert np.isfinite(wide["default"]).all() and np.isinf(narrow["default"][0, :3]).all()


def test_fp16_arithmetic_leaves_the_sizes_of_results_alone() -> None:
    declared = TensorType("fp32", (1, 1, 1, 8))
    # as fp16 the factor is 1.5996: one pixel less
    factor = Constant(TensorType("fp32", ()), lambda: np.float32(1.60005), nbytes=4)
    resize = op("upsample_nearest_neighbor", "y", declared, x="x", scale_factor_width=factor)
    program = hand_made([resize], {"x": TensorType("fp32", (1, 1, 1, 5))}, {"y": declared}).program
    x = np.zeros((1, 1, 1, 5), np.float32)
    out = ReferenceFunction(program, "main", "fp16").predict({"x": x})
    assert out["y"].shape == (1, 1, 1, 8)


# ---- programs that are wrong


def test_an_unknown_op_is_refused_when_the_function_is_loaded() -> None:
    with pytest.raises(
        UserError, match=r"op frobnicate 'y' in function 'main': .*does not execute"
    ):
        hand_made([op("frobnicate", "y", FP16, x="x")], {"x": FP16}, {"y": FP16})


def test_an_op_of_a_later_opset_is_unknown_in_an_earlier_one() -> None:
    program = hand_made(
        [op("fill_like", "y", FP16, ref_tensor="x")], {"x": FP16}, {"y": FP16}
    ).program
    older = replace(program.functions["main"], opset="CoreML5")
    with pytest.raises(UserError, match=r"op fill_like.*no op of this name in the iOS15 opset"):
        ReferenceFunction(replace(program, functions={"main": older}), "main")


@pytest.mark.parametrize(
    "declared, message",
    [
        (TensorType("fp16", (3,)), r"another shape than declared; found: \[2\] for \[3\]"),
        (TensorType("fp16", (2, 1)), r"another shape than declared; found: \[2\] for \[2, 1\]"),
        (
            TensorType("fp32", (2,)),
            "another type than declared; found: torch.float16 for torch.float32",
        ),
        (TensorType("int32", (2,)), "another type than declared"),
    ],
)
def test_a_result_that_is_not_what_is_declared_names_the_op(
    declared: TensorType, message: str
) -> None:
    function = hand_made([op("relu", "y", declared, x="x")], {"x": FP16}, {"y": declared})
    with pytest.raises(UserError, match=f"op relu 'y' in function 'main': result has {message}"):
        function.predict({"x": np.ones(2, np.float16)})


def test_a_missing_or_unexpected_input_of_an_op_is_refused_when_loaded() -> None:
    with pytest.raises(
        UserError, match="op add 'y' in function 'main': a required input is missing; found: y"
    ):
        hand_made([op("add", "y", FP16, x="x")], {"x": FP16}, {"y": FP16})
    with pytest.raises(
        UserError, match="op relu 'y' in function 'main': it has an input that the op does not"
    ):
        hand_made([op("relu", "y", FP16, x="x", slope="x")], {"x": FP16}, {"y": FP16})
    with pytest.raises(
        UserError, match=r"op transpose 'y' in function 'main': a required input .*found: perm"
    ):
        hand_made([op("transpose", "y", FP16, x="x")], {"x": FP16}, {"y": FP16})


def test_a_state_that_is_written_with_another_type_is_refused_when_loaded() -> None:
    inputs = {"x": FP16, "state": StateType(TensorType("fp16", (3,)))}
    with pytest.raises(
        UserError,
        match="op write_state 'w' in function 'main': data has another type than the state",
    ):
        hand_made(
            [Operation("write_state", "w", {"input": ("state",), "data": ("x",)}, ())],
            inputs,
            {"x": FP16},
        )


def test_the_observer_sees_every_op_in_order(package: Get) -> None:
    function = load_package(package("net_ios18_fp16"), runtime="reference")
    seen: list[tuple[str, tuple[str, ...]]] = []
    out = function.observe(
        {"x": X}, lambda kind, name, outputs: seen.append((kind, tuple(outputs)))
    )
    assert [kind for kind, _ in seen if kind in ("conv", "silu", "softmax")] == [
        "conv",
        "silu",
        "conv",
        "softmax",
    ]
    assert np.array_equal(out["y"], function.predict({"x": X})["y"])


def test_an_endless_loop_ends_with_a_clear_error(
    package: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structural, "MAX_ITERATIONS", 500)
    function = load_package(package("loop"), runtime="reference")
    with pytest.raises(UserError, match="does not end"):
        function.predict({"x": np.zeros((1, 4), np.float32)})  # doubling zeros never reaches 100
