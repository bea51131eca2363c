"""Numbers inside a layer that the engine's sums do not hold, and the division that mends them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from ane_moe.conversion import stream_scale
from ane_moe.conversion.pipeline import convert
from ane_moe.conversion.plan import ConvertOptions
from ane_moe.families.taps import Taps
from ane_moe.manifest import read_manifest
from ane_moe.model.spec import FROM_UPS, FROM_VALUES, UPS, VALUES, InnerScale, ModelSpec
from ane_moe.opened import open_model
from ane_moe.original.ranges import LayerRange, needed_inner
from ane_moe.original.sums import PartialSums, known_matrices
from ane_moe.report.convert_table import stream_line
from ane_moe.verification.verify import verify
from tests.models import make_model, save_checkpoint
from tests.verification.overflowing import OPTIONS, prompts, reports  # noqa: F401
from tests.verification.tiny import edit_tensors, tiny_checkpoint

LARGER, SMALLER = 2.0**17, 2.0**-10
FAMILIES = ("qwen2_moe", "granitemoe", "mixtral", "olmoe", "lfm2_moe")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Hidden states are small; sums of values and of up are not."""
    folder = tiny_checkpoint("qwen3_moe", tmp_path_factory.mktemp("checkpoint"))

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith(("v_proj.weight", "up_proj.weight")):
                tensors[name] = tensor * LARGER
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                tensors[name] = tensor * SMALLER

    edit_tensors(folder, edit)
    return folder


def test_before_sums_overflow_inside_layers(reports):
    report = verify(reports["before"].folder, precision="engine")
    assert not report.passed and not reports["before"].manifest.inner
    overflowing = {row.name for row in report.engine.overflowing}
    assert any(name.startswith("v_") for name in overflowing) and len(overflowing) > 1
    # Only those inside: hidden states are no matter.
    assert report.stream_divisor == 1
    assert needed_inner(report.ranges) == reports["after"].stream.inner


def test_after_it_is_hugging_faces_model_in_the_engines_arithmetic(reports):
    after = reports["after"]
    (row,), scale = after.stream.ranges, after.stream.inner[0]
    assert after.stream.divisor == 1 and scale.values < 1 and scale.ups < 1
    assert row.values * scale.values <= 32752 / 2 < 2 * row.values * scale.values
    assert after.manifest.inner == {"0": {"values": scale.values, "ups": scale.ups}}
    line = stream_line(after.stream)
    assert f"values of layer 0 divided by {1 / scale.values:.0f}" in line
    assert f"up of layer 0 divided by {1 / scale.ups:.0f}" in line and "no weight lost" in line
    for precision in ("fp32", "engine"):
        report = verify(after.folder, precision=precision)
        assert report.passed and not needed_inner(report.ranges)
        assert all(row.logit_cosine >= 0.9999 for row in report.models)
    assert not report.engine.overflowing
    # The operation whose name is `v` met what was heard of Hugging Face's.
    (found,) = (row for row in report.engine.operations if row.name.startswith("v_cast"))
    assert found.largest_partial == pytest.approx(report.ranges[0].values, rel=2e-3)


def test_a_calibration_shows_the_need_too(large, prompts, tmp_path):
    report = convert(large, tmp_path / "out", replace(OPTIONS, calibrate="builtin"))
    assert report.manifest.inner and report.manifest.golden is None
    assert verify(tmp_path / "out", checkpoint=large, prompts=prompts).passed


def test_a_checkpoint_is_verified_against_weights_as_stored(large, prompts, tmp_path):
    options = ConvertOptions(prefill=0, context=32)
    report = convert(large, tmp_path / "out", options, golden=True, prompts=prompts)
    assert report.manifest.inner and report.manifest.compressed
    for found in (
        verify(tmp_path / "out"),
        verify(tmp_path / "out", checkpoint=large, prompts=prompts),
    ):
        assert found.passed and not found.as_stored.failures


def test_without_need_nothing_is_divided(conversion):
    assert read_manifest(conversion).inner == {}
    report = verify(conversion)
    assert all(0 < row.inner_share < 0.01 for row in report.ranges)
    assert all(min(row.values, row.ups, row.hidden) > 0 for row in report.ranges)


SCALES = {layer: InnerScale(values=1 / 4, ups=1 / 8) for layer in (0, 1)}


def _converted(family: str, prompts: Path, folder: Path) -> Path:
    checkpoint = save_checkpoint(
        make_model(family, num_hidden_layers=2, vocab_size=61), folder / "checkpoint"
    )
    convert(checkpoint, folder / "out", OPTIONS, golden=True, prompts=prompts)
    return folder / "out"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_divided(family, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(stream_scale, "needed_inner", lambda _: SCALES)
    out = _converted(family, prompts, tmp_path)
    assert set(read_manifest(out).inner) == {"0", "1"}
    found = verify(out)
    assert found.passed and all(row.logit_cosine > 0.9999 for row in found.models)
    # What is heard of each family: none is forgotten, but where a layer has no attention.
    assert all(min(row.ups, row.hidden) > 0 for row in found.ranges)
    assert any(row.values > 0 for row in found.ranges)


@pytest.mark.parametrize(("forgotten", "kind"), [(FROM_VALUES, "attn"), (UPS, "moe")])
def test_a_multiplier_that_is_forgotten_is_caught(forgotten, kind, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(stream_scale, "needed_inner", lambda _: SCALES)
    right = ModelSpec.multiplier

    def wrong(spec: ModelSpec, fold: str, *where: int | str | None) -> float:
        return 1.0 if fold == forgotten else right(spec, fold, *where)

    monkeypatch.setattr(ModelSpec, "multiplier", wrong)
    report = verify(_converted("mixtral", prompts, tmp_path))
    assert {row.kind for row in report.shards if not row.passed} == {kind}


@pytest.mark.parametrize(
    ("family", "overrides", "folds"),
    [
        ("olmoe", {"clip_qkv": None}, {VALUES, FROM_VALUES, UPS, FROM_UPS}),
        ("olmoe", {"clip_qkv": 3.0}, {UPS, FROM_UPS}),
        ("openai_privacy_filter", {}, {VALUES, FROM_VALUES}),  # clamps what up gives
        ("zaya", {}, {UPS, FROM_UPS}),
    ],
)
def test_what_a_clamp_reads_is_not_divided(family, overrides, folds, tmp_path):
    model = open_model(save_checkpoint(make_model(family, **overrides), tmp_path))
    inner = {VALUES, FROM_VALUES, UPS, FROM_UPS}
    assert {source.fold for source in model.sources.values()} & inner == folds


def test_the_least_powers_of_two_leave_room():
    ranges = [
        LayerRange(0, 1.0, 1.0, values=16376.0, ups=16376.0, hidden=32752.0),
        LayerRange(1, 1.0, 1.0, values=16377.0, ups=1.0, hidden=70000.0),
        LayerRange(1, 1.0, 1.0, values=40000.0),  # of another source
        LayerRange(2, 1.0, 1.0, values=float("inf")),
    ]
    assert needed_inner(ranges) == {1: InnerScale(values=1 / 4, ups=1 / 4)}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.v_proj = nn.Linear(8, 8)
        self.up_proj, self.down_proj = nn.Linear(8, 6, bias=False), nn.Linear(6, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down_proj(self.up_proj(x)) + self.v_proj(x)
        return y


def test_each_sum_is_of_its_own_matrix():
    torch.manual_seed(0)
    block, x = Block(), torch.randn(5, 8)
    with torch.no_grad(), PartialSums(8, known_matrices(block, Taps(), None)) as sums:
        block(x)
    up = x @ block.up_proj.weight.detach().T
    for inputs, layer, found in (
        (x, block.v_proj, sums.values),
        (x, block.up_proj, sums.ups),
        (up, block.down_proj, sums.largest),
    ):
        terms = inputs[:, None] * layer.weight.detach()[None]
        if layer.bias is not None:
            bias = layer.bias.detach()[None, :, None].expand(5, -1, -1)
            terms = torch.cat([terms, bias], -1)
        worst = max(terms.clamp(min=0).sum(-1).max(), -terms.clamp(max=0).sum(-1).min())
        assert found == pytest.approx(float(worst), rel=1e-5)
    assert sums.hidden == pytest.approx(float(up.abs().max()))
