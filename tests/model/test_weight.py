"""Names of our tensors, and the rows of parts against the modules they stand for."""

import math
from dataclasses import replace

import pytest

from ane_moe.model.attention import AttentionConfig, RingConfig, SharedAttentionConfig
from ane_moe.model.band import BandConfig
from ane_moe.model.cca import CcaConfig, CcaSpec
from ane_moe.model.delta_net import DeltaNetConfig, DeltaNetSpec
from ane_moe.model.eda_router import EdaRouterSpec
from ane_moe.model.experts import ExpertGroupConfig, GivenExpertConfig, SharedExpertConfig
from ane_moe.model.head import HeadConfig
from ane_moe.model.join import JoinConfig
from ane_moe.model.kda import KdaConfig, KdaSpec
from ane_moe.model.lightning import LightningConfig, LightningSpec
from ane_moe.model.mamba import MambaConfig, MambaSpec
from ane_moe.model.mamba2 import Mamba2Config, Mamba2Spec
from ane_moe.model.mla import MlaConfig, MlaSpec
from ane_moe.model.mlp import DenseConfig
from ane_moe.model.moa import MoaConfig, MoaSpec
from ane_moe.model.moe import MoeConfig
from ane_moe.model.ranking import Ranking
from ane_moe.model.residual import ResidualSpec
from ane_moe.model.routed import EarlyConfig, RoutedMixerConfig, RoutingConfig
from ane_moe.model.short_conv import ShortConvConfig, ShortConvSpec
from ane_moe.model.spec import (
    BandSpec,
    Clamp,
    GqaSpec,
    HeadSpec,
    LayerSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    NormSpec,
    RouterSpec,
    SharedGqaSpec,
    SharedSpec,
    Temperature,
)
from ane_moe.model.stack import PackedConfig, StackConfig
from ane_moe.model.weight import Directions, Place, Selection, Weight, parse_name
from ane_moe.parts.registry import MIXERS
from ane_moe.parts.unbound import BLOCKS, build_unbound

D, NORM, RANKS = 16, NormSpec(), (2, 0, 3)
GQA = GqaSpec(4, 2, 8, scale=1.0, rope=None, qkv_bias=True, o_bias=True, qk_norm="head")
FULL = GqaSpec(4, 2, 8, scale=1.0, rope=None, qk_norm="full")
MOE = MoeSpec(RouterSpec(4, 2), MlpSpec(24), SharedSpec(MlpSpec(8), gated=True))
EDA = MoeSpec(EdaRouterSpec(4, 6, takes=True, eps=1e-5), MlpSpec(24))
UNIT = GqaSpec(4, 2, 8, 1.0, "main", qk_norm="unit", chunk=4, temperature=Temperature(4, 0.1))
KEYS = GqaSpec(4, 2, 8, 1.0, None, True, qk_norm="head", v_norm=True, keys_are_values=True)
BESIDE = MoeSpec(
    RouterSpec(4, 2, bias=True, weighed=True),
    MlpSpec(24, activation="gelu"),
    beside=MlpSpec(40),
    router_norm=True,
)
BAND = BandSpec(4, 2, 8, scale=1.0, rope=None, qkv_bias=True, sinks=True, reach=3)
CLAMPED = MoeSpec(RouterSpec(4, 2, logit_bias=True), MlpSpec(24, Clamp(7.0, 1.7), bias=True))
MLA = MlaSpec(4, 6, 4, 8, 10, 12, scale=1.0, rope="main", bias=True)
CCA = CcaSpec(4, 2, 8, scale=1.0, rope="main")
ROUNDED = {"qk_norm": "rotated", "rounded": True}
OWN = GqaSpec(4, 2, 8, scale=1.0, rope="main", **ROUNDED)
SHARED = SharedGqaSpec(4, 2, 8, scale=1.0, rope="main", source=1, **ROUNDED)
ATTENTION = AttentionConfig(D, NORM, GQA, 0, 32, ranks=(("q", 1), ("v", 2), ("o", 3)))
DENSE = DenseConfig(D, NORM, MlpSpec(24), RANKS)
CONFIGS = [
    ATTENTION,
    AttentionConfig(D, NORM, FULL, 4, 32),
    AttentionConfig(D, NORM, KEYS, 4, 32),
    AttentionConfig(D, NORM, UNIT, 4, 32),
    RoutedMixerConfig(ATTENTION, BESIDE.router, router_norm=True),
    AttentionConfig(D, NORM, OWN, 4, 32),
    SharedAttentionConfig(D, NORM, SHARED, 4, 32, ranks=(("q", 1), ("o", 3))),
    RingConfig(D, NORM, replace(GQA, window=9), 0, 32),
    CcaConfig(
        D,
        NORM,
        CCA,
        2,
        32,
        ranks=(("v_delayed", 2),),
        residual=ResidualSpec(affine=True),
        entry=True,
    ),
    ShortConvConfig(D, NORM, ShortConvSpec(3, bias=True), ranks=(("b", 2),)),
    RoutedMixerConfig(ATTENTION, MOE.router),
    RoutingConfig(D, NORM, MOE.router),
    RoutedMixerConfig(ATTENTION, MOE.router, early=EarlyConfig(5, Ranking())),
    RoutingConfig(D, NORM, MOE.router, early=EarlyConfig(5, Ranking())),
    RoutedMixerConfig(ATTENTION, EDA.router, residual=ResidualSpec(affine=True)),
    DENSE,
    DenseConfig(D, NORM, MlpSpec(24), residual=ResidualSpec(affine=True)),
    MoeConfig(D, NORM, MOE, 4, True, False, RANKS, RANKS),
    MoeConfig(D, NORM, MOE, 2, False),
    MoeConfig(D, NORM, EDA, 4, True, residual=ResidualSpec(affine=True)),
    MoeConfig(D, NORM, EDA, 2, False, residual=ResidualSpec(affine=True)),
    MoeConfig(D, NORM, EDA, 4, True, soft=True),
    StackConfig(((None, DENSE), (ATTENTION, None))),
    DenseConfig(D, NORM, MlpSpec(24, bias=True, squared=True), RANKS),
    StackConfig(((ATTENTION, DENSE), (ATTENTION, MoeConfig(D, NORM, MOE, 4, True)))),
    PackedConfig(((ATTENTION, DENSE), (ATTENTION, DENSE)), tracks=2),
    ExpertGroupConfig(D, MOE.expert, 3, RANKS),
    ExpertGroupConfig(D, MOE.expert, 2, affine=True),
    GivenExpertConfig(ExpertGroupConfig(D, MOE.expert, 1, RANKS)),
    SharedExpertConfig(D, MOE.shared, RANKS),
    HeadConfig(D, NORM, 20, 2),
    HeadConfig(D, NORM, 5, bias=True),
    BandConfig(D, NORM, BAND, ranks=(("o", 2),)),
    MoeConfig(D, NORM, CLAMPED, 4, True, False, RANKS),
    MlaConfig(D, NormSpec(kind="layer", bias=True), MLA, 2, 32, ranks=(("q_down", 2),)),
    MoeConfig(D, NORM, MOE, 4, True, residual=ResidualSpec("around")),
    MoeConfig(D, NORM, MOE, 2, True, residual=ResidualSpec("after")),
    DenseConfig(D, NORM, MlpSpec(24), residual=ResidualSpec("around")),
    JoinConfig(D, NORM, ResidualSpec("around")),
    JoinConfig(D, NORM, ResidualSpec("after", scaled=True), MlpSpec(24), RANKS),
    MoeConfig(
        D, NORM, BESIDE, 4, True, residual=ResidualSpec("around", scaled=True), beside_ranks=RANKS
    ),
    DenseConfig(D, NORM, MlpSpec(24), residual=ResidualSpec("around", scaled=True)),
    DeltaNetConfig(D, NORM, DeltaNetSpec(2, 4, 8, 6, 3, 1e-6), ranks=(("query", 2), ("z", 1))),
    KdaConfig(D, NORM, KdaSpec(2, 2, 8, 8, 3, 1e-6, rank=8), ranks=(("z_down", 2), ("z", 1))),
    KdaConfig(D, NORM, KdaSpec(2, 2, 8, 8, 3, 1e-6, floor=5.0)),
    LightningConfig(
        D, NORM, LightningSpec(2, 8, 1e-6), ranks=(("gate", 2),), residual=ResidualSpec(keeps=2.0)
    ),
    MoaConfig(D, NORM, MoaSpec(2, 8, experts=4, k=2, scale=0.3, rope=None), slots=32),
    MambaConfig(D, NORM, MambaSpec(32, 8, 5, 3, 1e-6, bias=True), ranks=(("u", 2),)),
    Mamba2Config(D, NORM, Mamba2Spec(4, 6, 2, 8, 3, 1e-6, bias=True), ranks=(("u", 2),)),
]
SPEC = ModelSpec(
    "any", D, 50, 64, NORM, (LayerSpec(GQA, MOE), LayerSpec(FULL, MlpSpec(40))), HeadSpec(False), {}
)


def elements(config, row):
    """How many elements a row stands for."""
    if not isinstance(row, Directions):
        return math.prod(row.shape)
    matrix = next(
        other for other in config.rows() if isinstance(other, Weight) and other.path == row.of
    )
    return row.rank * matrix.shape[1 if row.side == "in" else 0]


def test_every_block_is_tried():
    assert {type(config) for config in CONFIGS} == {
        *BLOCKS,
        *MIXERS,
    }


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_the_rows_of_a_block_are_its_modules_parameters_in_order(config):
    parameters = [
        (name, parameter.numel()) for name, parameter in build_unbound(config).named_parameters()
    ]
    assert [(row.path, elements(config, row)) for row in config.rows()] == parameters


def test_names_survive_being_written_and_read():
    names = [name for name, _ in SPEC.weights()]
    assert len(set(names)) == len(names) and [parse_name(str(name)) for name in names] == names
    for text in ("", "embed", "layers.x.attn.q.weight", "layers.1.attn"):
        with pytest.raises(ValueError, match="names no tensor"):
            parse_name(text)


@pytest.mark.parametrize(
    ("place", "parameter", "name"),
    [
        (Place((3,), "attn"), "q.weight", "layers.3.attn.q.weight"),
        (Place((3,), "attn"), "ffn.router.weight", "layers.3.ffn.router.weight"),
        (Place((3,), "ffn", (8, 9)), "experts.1.up.weight", "layers.3.ffn.experts.9.up.weight"),
        (Place((3,), "ffn"), "shared.gate.weight", "layers.3.ffn.shared.gate.weight"),
        (
            Place((4, 5), "", (0, 1)),
            "layers.1.ffn.experts.0.down.weight",
            "layers.5.ffn.experts.0.down.weight",
        ),
        (Place((), "head"), "rows.weight", "head.rows.weight"),
    ],
)
def test_a_parameter_is_the_tensor_of_its_blocks_place(place, parameter, name):
    assert place.name(parameter) == parse_name(name)


def test_every_weight_of_a_model_has_a_parameter_in_the_blocks_of_its_layers():
    blocks = {
        Place((0,), "attn"): ATTENTION,
        Place((0,), "ffn", (0, 1, 2, 3)): MoeConfig(D, NORM, MOE, 4, True),
        Place((1,), "attn"): AttentionConfig(D, NORM, FULL, 0, 32),
        Place((1,), "ffn"): DenseConfig(D, NORM, MlpSpec(40)),
        Place((), "head"): HeadConfig(D, NORM, 50),
    }
    held = {}
    for place, config in blocks.items():
        rows = (row for row in config.rows() if isinstance(row, Weight))
        held |= {place.name(row.path): (row.shape, row.role) for row in rows}
    needed = {name: (row.shape, row.role) for name, row in SPEC.weights()}
    assert held == {name: facts for name, facts in needed.items() if str(name) != "embed.weight"}


def test_what_a_part_reads_is_told_apart_unless_it_is_the_wholes_own_input():
    inner = Weight("down.weight", (2, 3), "shared.down", reads="hidden").under("shared")
    assert (inner.path, inner.reads) == ("shared.down.weight", "shared.hidden")
    assert Weight("gate.weight", (2, 3), reads="x").under("shared").reads == "x"
    assert Selection("select.weight", (1, 4)).under("ffn").path == "ffn.select.weight"
