"""Predictions against compute plans that were published whole, and the rules these speak of."""

import pytest

from ane_moe.forecast.chips import find_chip
from ane_moe.placement.facts import function_facts
from ane_moe.placement.predicted import predict
from ane_moe.placement.published.graphs import Graph
from ane_moe.placement.published.points import PLANS
from ane_moe.placement.published.recorded import measured_graph
from ane_moe.placement.targets import SYSTEMS, find_target

# Parameters of the models as published, without what the graphs leave out: the classifiers, the
# positions that 128 tokens do not use, SigLIP's pooling head. Of each batch norm's two vectors one
# is folded into the weights.
PARAMETERS = {
    "resnet50": 25_557_032 - 2_049_000 - 26_560,
    "mobilenet": 3_504_872 - 1_281_000 - 17_056,
    "whisper": 8_208_384,
    "siglip": 85_797_120,
    "distilbert": 66_362_880 - (512 - 128) * 768,
}


def placed(program, target="m4-pro", os=26):
    report = predict([(program, "p")], find_target(target, os))
    (function,) = report.functions
    return report, function


def patches(kernel: int, stride: int):
    g = Graph(weights="fp16")
    x = g.input("x", (64, 3, 224, 224))
    weight, side = g.weight((768, 3, kernel, kernel)), (224 - kernel) // stride + 1
    conv = g.op(
        "conv",
        (64, 768, side, side),
        x=x,
        weight=weight,
        strides=[stride, stride],
        pad_type="valid",
    )
    return g.program(conv)


def normed(rank: int, shapes=(), ranges=None):
    """The graph of coremltools issue 1909: a layer norm over 2048, and a product."""
    shape = (1,) * (rank - 3) + (3, 2048, 2048)
    g = Graph(weights="fp16")
    x = g.input("x", (None, *shape[1:]) if ranges else shape, shapes=shapes, ranges=ranges)
    y = g.op("layer_norm", shape, x=x, axes=[-1], epsilon=1e-5)
    return g.program(g.matmul(y, g.weight((2048, 2048))))


@pytest.mark.parametrize("chip", ["m4-pro", "m5-max"])
@pytest.mark.parametrize("name", PLANS)
def test_as_many_operations_are_predicted_on_the_engine_as_were_measured(name, chip):
    plan = PLANS[name]
    report, function = placed(measured_graph(name), chip)
    assert len(function.ops) == plan.operations
    assert (function.count("ane"), function.count("cpu")) == (
        plan.operations - plan.on_cpu,
        plan.on_cpu,
    )
    assert report.passed == (plan.on_cpu == 0)


@pytest.mark.parametrize("name", PLANS)
def test_a_rebuilt_graph_holds_the_parameters_of_its_model(name):
    stored = function_facts(measured_graph(name), "main").facts["weight_bytes"]
    assert stored / 2 == pytest.approx(PARAMETERS[name], rel=1e-3)


@pytest.mark.parametrize("os", SYSTEMS)
@pytest.mark.parametrize("kind", ["input", "output"])
def test_a_cast_from_or_to_fp32_fails_no_gate(kind, os):
    g = Graph(weights="fp16")
    x = g.input("x", (1, 2304, 1, 1), "fp32" if kind == "input" else "fp16")
    y = g.swiglu(g.cast(x, "fp16") if kind == "input" else x, 9216)
    report, function = placed(g.program(g.cast(y, "fp32") if kind == "output" else y), "m4-max", os)
    (verdict,) = {op.verdict for op in function.ops if op.op_type == "cast"}
    legal = os >= 27 or (kind == "input" and os == 26)
    assert report.passed and verdict == ("ane" if legal else "uncertain")


def test_a_kernel_as_wide_as_its_stride_is_on_the_engine_and_a_sliding_one_is_not():
    assert placed(patches(16, 16))[1].verdict == "ane"
    assert placed(patches(16, 8))[1].verdict == "cpu"
    assert placed(patches(32, 32))[1].verdict == "uncertain"
    assert placed(patches(16, 16), "m1")[1].verdict == "uncertain"


def test_a_layer_norm_of_rank_3_leaves_the_engine_with_enumerated_shapes_only():
    """coremltools 1909: 20 ms with a fixed shape and with RangeDim(1, 3), 175 ms with two of them
    enumerated."""
    whole = ((1, 3), (2048, 2048), (2048, 2048))
    enumerated = placed(normed(3, shapes=((3, 2048, 2048), (1, 2048, 2048))))[1]
    assert [op.verdict for op in placed(normed(3))[1].ops] == ["ane", "ane"]
    assert {item.rule for item in placed(normed(3, ranges=whole))[1].findings} == {
        "shape-range-small"
    }
    assert enumerated.ops[0].verdict == "cpu" and "layer-norm-enumerated" in enumerated.ops[0].rules


@pytest.mark.parametrize(
    ("target", "verdict"), [("m4-pro", "ane"), ("m1", "ane"), ("iphone-a17", "uncertain")]
)
def test_depthwise_convolutions_are_on_the_engine_of_a_mac_and_contested_on_a_phone(
    target, verdict
):
    _, function = placed(measured_graph("mobilenet"), target)
    depthwise = [
        op for op in function.ops if any(rule.startswith("conv-depthwise") for rule in op.rules)
    ]
    assert len(depthwise) == 17 and {op.verdict for op in depthwise} == {verdict}


def test_an_m3_ultra_is_a_target_of_the_engine_of_its_generation_and_of_the_cost_model():
    ultra, other = find_target("m3-ultra"), find_target("m3-max")
    assert (ultra.generation, ultra.limits, ultra.device) == (
        other.generation,
        other.limits,
        "mac",
    )
    assert find_chip("m3-ultra").range("stream_gb_s").contains(1050.673728 / 8.71199369430542)
