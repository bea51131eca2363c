"""Templates: every weight is where the traced block has it, or the conversion stops."""

from dataclasses import replace

import pytest

from ane_moe.coreml_tools import Model_pb2, ct, validating_once
from ane_moe.emit.coreml import tracing as trace
from ane_moe.emit.coreml.template import value_name
from ane_moe.emit.coreml.token_count import MARKER, with_token_count
from ane_moe.emit.coreml.tracing import ConversionError, make_template
from ane_moe.model.attention import AttentionConfig
from ane_moe.model.band import BandConfig
from ane_moe.model.cca import CcaConfig, CcaSpec
from ane_moe.model.eda_router import EdaRouterSpec
from ane_moe.model.experts import ExpertGroupConfig, SharedExpertConfig
from ane_moe.model.head import HeadConfig
from ane_moe.model.mlp import DenseConfig
from ane_moe.model.moe import MoeConfig
from ane_moe.model.residual import ResidualSpec
from ane_moe.model.routed import RoutedMixerConfig
from ane_moe.model.short_conv import ShortConvConfig, ShortConvSpec
from ane_moe.model.spec import (
    BandSpec,
    Clamp,
    GqaSpec,
    MlpSpec,
    MoeSpec,
    NormSpec,
    RouterSpec,
    SharedSpec,
)
from ane_moe.model.stack import StackConfig
from ane_moe.model.template_key import TemplateKey
from ane_moe.parts.projection import Projection
from ane_moe.parts.unbound import BLOCKS
from tests.slow_set import slow_but

NORM = NormSpec()
BOTH = (("decode", 1), ("prefill", 8))
DENSE = TemplateKey(DenseConfig(16, NORM, MlpSpec(24)), BOTH)
MOE = MoeSpec(RouterSpec(4, 2), MlpSpec(24), SharedSpec(MlpSpec(8), gated=True))
EDA = MoeSpec(EdaRouterSpec(4, 8, takes=True, eps=1e-5), MlpSpec(24))
CCA = CcaSpec(4, 2, 8, 0.3, "main")
GQA = GqaSpec(4, 2, 8, 0.3, "main", qkv_bias=True, o_bias=True, qk_norm="head", clip_qkv=3.0)
BAND = BandSpec(4, 2, 8, 0.3, "main", qkv_bias=True, o_bias=True, sinks=True, reach=5)
CLAMPED = MoeSpec(RouterSpec(4, 2, logit_bias=True), MlpSpec(24, Clamp(7.0, 1.702), bias=True))


def operations(template, function):
    program = Model_pb2.Model.FromString(template.model).mlProgram.functions[function]
    return program.block_specializations[program.opset].operations


# The same graph between two transpositions, which the first test has for every block.
TOKENS_FIRST = pytest.param("bct1", marks=pytest.mark.slow)


@pytest.mark.parametrize("layout", ["bc1s", "bct1"])
@pytest.mark.parametrize(
    "block",
    [
        AttentionConfig(16, NORM, GQA, rotary=4, slots=32),
        AttentionConfig(16, NORM, GQA, rotary=2, slots=32, explicit=True),
        MoeConfig(16, NORM, MOE, experts=4, first=True),
        MoeConfig(16, NORM, MOE, experts=2, first=False),
        DenseConfig(16, NORM, MlpSpec(24)),
        HeadConfig(16, NORM, 20),
        BandConfig(16, NORM, BAND, rotary=4),
        MoeConfig(16, NORM, CLAMPED, experts=4, first=True),
    ],
    ids=lambda block: type(block).__name__,
)
def test_every_block_converts_with_all_its_weights_as_constants_of_both_functions(block, layout):
    template = make_template(TemplateKey(block, BOTH, layout))
    for function in ("decode", "prefill"):
        constants = {
            op.outputs[0].name for op in operations(template, function) if op.type == "const"
        }
        assert {value_name(name) for name in template.weights} <= constants
    assert not any("blobFileValue" in str(op) for op in operations(template, "decode"))


@pytest.mark.parametrize("layout", slow_but(["bc1s"], ["bc1s", TOKENS_FIRST]))
@pytest.mark.parametrize(
    "block",
    [
        AttentionConfig(16, NORM, GQA, rotary=4, slots=32),
        AttentionConfig(
            16,
            NORM,
            GQA,
            rotary=2,
            slots=32,
            explicit=True,
            ranks=(("q", 2), ("k", 2), ("v", 2), ("o", 2)),
        ),
        CcaConfig(
            16, NORM, CCA, rotary=2, slots=32, residual=ResidualSpec(affine=True), entry=True
        ),
        CcaConfig(16, NORM, CCA, rotary=2, slots=32, explicit=True),
        ShortConvConfig(16, NORM, ShortConvSpec(3)),
        ShortConvConfig(16, NORM, ShortConvSpec(4, bias=True), explicit=True),
        MoeConfig(16, NORM, EDA, experts=4, first=True, residual=ResidualSpec(affine=True)),
        MoeConfig(16, NORM, EDA, experts=2, first=False, residual=ResidualSpec(affine=True)),
        RoutedMixerConfig(
            CcaConfig(16, NORM, CCA, rotary=2, slots=32, residual=ResidualSpec(affine=True)),
            EDA.router,
            residual=ResidualSpec(affine=True),
        ),
        ExpertGroupConfig(16, EDA.expert, 2, affine=True),
        MoeConfig(16, NORM, MOE, experts=4, first=True),
        MoeConfig(16, NORM, MOE, experts=2, first=False, soft=True),
        RoutedMixerConfig(AttentionConfig(16, NORM, GQA, rotary=4, slots=32), MOE.router),
        ExpertGroupConfig(16, MOE.expert, 2),
        SharedExpertConfig(16, MOE.shared),
        StackConfig(
            (
                (
                    AttentionConfig(16, NORM, GQA, rotary=4, slots=32),
                    MoeConfig(16, NORM, MOE, 4, True),
                ),
                (
                    AttentionConfig(16, NORM, GQA, rotary=4, slots=32),
                    DenseConfig(16, NORM, MlpSpec(24)),
                ),
            )
        ),
        HeadConfig(16, NORM, 20),
        HeadConfig(16, NORM, 5, bias=True),
        AttentionConfig(16, NORM, replace(GQA, sinks=True), rotary=4, slots=32),
        MoeConfig(16, NORM, CLAMPED, experts=2, first=False),
        ExpertGroupConfig(16, CLAMPED.expert, 2),
    ],
    ids=lambda block: type(block).__name__,
)
def test_setting_the_token_count_gives_the_bytes_of_a_conversion_for_it(block, layout):
    assert_set_as_converted(block, layout, (("decode", 1), ("t3", 3), ("prefill", 64)))


@pytest.mark.parametrize("layout", ["bc1s", TOKENS_FIRST])
@pytest.mark.parametrize(
    "block",
    [
        BandConfig(16, NORM, BAND, rotary=4),
        RoutedMixerConfig(BandConfig(16, NORM, BAND, rotary=4), CLAMPED.router),
        StackConfig(((BandConfig(16, NORM, BAND), MoeConfig(16, NORM, CLAMPED, 4, True)),) * 2),
    ],
    ids=lambda block: type(block).__name__,
)
def test_a_block_that_is_as_high_as_it_is_wide_follows_the_token_count(block, layout):
    """Of one token alone, a conversion for it would leave out slices that keep all."""
    assert_set_as_converted(block, layout, (("length_3", 3), ("length_64", 64)))


def assert_set_as_converted(block, layout, functions):
    key = TemplateKey(block, functions, layout)
    unbound = trace.build_unbound(block)
    weights = {name: tuple(parameter.shape) for name, parameter in unbound.named_parameters()}
    traced = trace._trace(unbound, unbound.ports(1), layout)
    each = {
        name: trace._convert(traced, unbound.ports(tokens), weights, layout)
        for name, tokens in key.functions
    }
    assert make_template(key).model == trace._join(each)


@pytest.mark.parametrize("size", [MARKER + 65, 3 * MARKER - 65, MARKER * MARKER])
def test_a_size_out_of_proportion_to_the_tokens_stops_the_conversion(size):
    model = Model_pb2.Model()
    model.description.input.add().type.multiArrayType.shape.extend([1, 2 * MARKER])
    assert list(with_token_count(model, 3).description.input[0].type.multiArrayType.shape) == [1, 6]
    model.description.input[0].type.multiArrayType.shape[:] = [MARKER + 2, 2 * MARKER - 1]
    assert list(with_token_count(model, 3).description.input[0].type.multiArrayType.shape) == [5, 5]
    model.description.input[0].type.multiArrayType.shape.append(size)
    with pytest.raises(ValueError, match="not in proportion"):
        with_token_count(model, 3)


def test_coremltools_checks_programs_again_afterwards():
    program = ct.converters.mil.mil.Program
    original = program.validate
    with validating_once():
        assert program.validate is not original
    assert program.validate is original


def test_the_engine_friendly_graph_has_no_gathers_comparisons_or_fused_silu():
    template = make_template(TemplateKey(MoeConfig(16, NORM, MOE, 4, True), BOTH))
    types = {op.type for op in operations(template, "prefill")}
    assert types == {
        "const",
        "abs",
        "reduce_max",
        "clip",
        "real_div",
        "mul",
        "reduce_mean",
        "add",
        "rsqrt",
        "conv",
        "sub",
        "softmax",
        "slice_by_index",
        "sigmoid",
        "reshape",
        "reduce_sum",
    }


def test_names_of_weights_stay_apart_in_the_program():
    assert value_name("shared_gate.weight") != trace.value_name("shared.gate.weight")


def test_two_exchanged_weights_of_the_same_shape_are_noticed(monkeypatch):
    def exchange(traced, n_inputs, names):
        uses = original(traced, n_inputs, names)
        other = {"mlp.gate.weight": "mlp.up.weight", "mlp.up.weight": "mlp.gate.weight"}
        return [(other.get(name, name), kind) for name, kind in uses]

    original = trace._uses_in_trace
    monkeypatch.setattr(trace, "_uses_in_trace", exchange)
    with pytest.raises(ConversionError, match="weights moved"):
        make_template(DENSE)


def test_a_weight_that_a_pass_folded_away_is_noticed(monkeypatch):
    convert = trace.ct.convert

    def folding(*args, **kwargs):
        model = convert(*args, **kwargs)
        specification = model.get_spec()
        (function,) = specification.mlProgram.functions.values()
        block = function.block_specializations[function.opset]
        for operation in block.operations:
            if operation.type == "conv":
                operation.inputs["weight"].arguments[0].name = (
                    operation.inputs["x"].arguments[0].name
                )
                break
        monkeypatch.setattr(model, "get_spec", lambda: specification)
        return model

    monkeypatch.setattr(trace.ct, "convert", folding)
    with pytest.raises(ConversionError, match=r"missing \['mlp\.(gate|up)\.weight'\]"):
        make_template(DENSE)


def test_a_weight_the_block_never_uses_is_noticed(monkeypatch):
    class WithSpare(BLOCKS[DenseConfig]):
        def __init__(self, config):
            super().__init__(config)
            self.spare = Projection(4, 4)

    monkeypatch.setitem(BLOCKS, DenseConfig, WithSpare)
    with pytest.raises(ConversionError, match="never uses"):
        make_template(DENSE)
