"""Hidden states that fp16 and the engine's sums do not hold, and the division that mends it."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from ane_moe.cli import main
from ane_moe.conversion.pipeline import convert
from ane_moe.conversion.plan import ConvertOptions
from ane_moe.manifest import read_manifest
from ane_moe.model.spec import InnerScale, ModelSpec
from ane_moe.opened import open_model, with_scales
from ane_moe.original.golden import LayerGolden, read_golden
from ane_moe.original.ranges import LayerRange, needed_divisor, range_of
from ane_moe.original.sums import PartialSums
from ane_moe.report.convert_table import stream_line
from ane_moe.report.verify_table import verify_report
from ane_moe.verification.verify import verify
from tests.models import make_model, save_checkpoint
from tests.verification.overflowing import OPTIONS, prompts, reports  # noqa: F401
from tests.verification.tiny import edit_tensors, tiny_checkpoint

FACTOR = 2.0**17
WRITERS = ("embed_tokens.weight", "o_proj.weight", "down_proj.weight")


def enlarge(folder: Path, factor: float = FACTOR) -> Path:
    """Multiply hidden states by a large number: every norm of them takes it out again."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith(WRITERS):
                tensors[name] = tensor * factor

    edit_tensors(folder, edit)
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """fp32 holds its hidden states, fp16 does not: as gpt-oss-120b's last layers."""
    return enlarge(tiny_checkpoint("qwen3_moe", tmp_path_factory.mktemp("checkpoint")))


def test_before_it_overflows_and_says_what_would_help(reports):
    report = verify(reports["before"].folder, precision="engine")
    assert not report.passed and report.engine.exact_failures
    overflowing = report.engine.overflowing
    assert overflowing and all(row.largest_partial >= 32768 for row in overflowing)
    assert report.stream_divisor == reports["after"].stream.divisor > 1
    assert not stream_line(reports["before"].stream)
    console = Console(width=200, file=io.StringIO())
    console.print(verify_report(report))
    assert f"--stream-scale {report.stream_divisor}" in console.file.getvalue()


def test_after_it_is_hugging_faces_model_in_the_engines_arithmetic(reports):
    for precision in ("fp32", "engine"):
        report = verify(reports["after"].folder, precision=precision)
        assert report.passed and report.stream_divisor * report.stream_scale <= 1
        assert all(row.logit_cosine >= 0.9999 for row in report.models)
        assert all(row.set_agreement == 1 for row in report.routing)
    assert not report.engine.overflowing


def test_the_least_power_of_two_is_found_that_leaves_room(reports):
    stream, before = reports["after"].stream, reports["before"].stream
    assert stream.ranges == before.ranges and before.divisor == 1
    (row,) = stream.ranges
    golden = read_golden(reports["after"].folder / "golden.safetensors").layers[0]
    assert row.stream == max(
        float(np.abs(one).max()) for one in (golden.x, golden.middle, golden.y)
    )
    assert row.sums > max(np.abs(golden.attn_delta).max(), 32768)
    room = min(65504 / row.stream, 32752 / row.sums) / 2
    assert stream.divisor == 2 ** math.ceil(-math.log2(room))
    assert reports["after"].manifest.stream_scale == 1 / stream.divisor
    assert f"divided by {stream.divisor}" in stream_line(stream)


@pytest.mark.parametrize("factor", [2, 0.5])
def test_a_wrong_exponent_is_caught(factor, reports, tmp_path):
    path = reports["after"].folder / "runtime_meta.json"
    written = path.read_text()
    data = json.loads(written)
    try:
        path.write_text(json.dumps(data | {"stream_scale": data["stream_scale"] * factor}))
        report = verify(reports["after"].folder)
    finally:
        path.write_text(written)
    failed = {row.kind for row in report.shards if not row.passed}
    assert failed == {"embed", "attn", "moe"}


def test_the_same_command_again_keeps_everything(large, reports, prompts):
    again = convert(large, reports["after"].folder, OPTIONS, golden=True, prompts=prompts)
    assert again.golden_kept and not again.written
    assert again.manifest == reports["after"].manifest
    assert again.stream == reports["after"].stream


def test_a_checkpoint_is_verified_against_weights_as_stored(large, prompts, tmp_path):
    options = ConvertOptions(prefill=0, context=32)
    report = convert(large, tmp_path / "out", options, golden=True, prompts=prompts)
    assert report.stream.divisor > 1 and report.manifest.compressed
    inside = verify(tmp_path / "out")
    now = verify(tmp_path / "out", checkpoint=large, prompts=prompts)
    for found in (inside, now):
        assert found.passed and not found.as_stored.failures
    assert now.shards == inside.shards


def test_a_calibration_shows_the_need_too(large, prompts, tmp_path):
    options = replace(OPTIONS, calibrate="builtin")
    report = convert(large, tmp_path / "out", options)
    assert report.stream.divisor > 1 and report.manifest.golden is None
    assert verify(tmp_path / "out", checkpoint=large, prompts=prompts).passed


def test_without_need_nothing_is_divided(conversion):
    assert read_manifest(conversion).stream_scale == 1
    report = verify(conversion)
    assert report.stream_divisor == 1 and len(report.ranges) == 2
    assert all(0 < row.share < 0.01 for row in report.ranges)


# Families with more than embeddings, outputs and biases: affine residuals, short convolutions.
@pytest.mark.parametrize("family", ["granitemoe", "lfm2_moe", "openai_privacy_filter", "zaya"])
def test_every_form_of_residual_can_be_divided(family, prompts, tmp_path):
    model = make_model(family, num_hidden_layers=2, vocab_size=61)
    checkpoint = save_checkpoint(model, tmp_path / "checkpoint")
    encoder = family == "openai_privacy_filter"
    lengths, context = ((16,), None) if encoder else (None, 32)
    options = replace(OPTIONS, lengths=lengths, context=context, stream_divisor=8)
    report = convert(checkpoint, tmp_path / "out", options, golden=True, prompts=prompts)
    assert report.manifest.stream_scale == 1 / 8 and report.stream.weights > 0
    found = verify(tmp_path / "out")
    assert found.passed and all(row.logit_cosine > 0.9999 for row in found.models)


def test_an_eps_that_is_not_divided_is_caught(prompts, tmp_path, monkeypatch):
    checkpoint = tiny_checkpoint("qwen3_moe", tmp_path / "checkpoint", rms_norm_eps=0.05)
    options = replace(OPTIONS, stream_divisor=8)
    convert(checkpoint, tmp_path / "right", options, golden=True, prompts=prompts)
    assert verify(tmp_path / "right").passed
    monkeypatch.setattr(
        ModelSpec, "with_stream", lambda spec, scale: replace(spec, stream_scale=scale)
    )
    convert(checkpoint, tmp_path / "wrong", options, golden=True, prompts=prompts)
    report = verify(tmp_path / "wrong")
    failed = {row.kind for row in report.shards if not row.passed}
    assert failed == {"attn", "moe", "lm_head"}


def test_digits_are_lost_only_below_the_normal_numbers_of_fp16(tmp_path, prompts):
    checkpoint = tiny_checkpoint("qwen3_moe", tmp_path / "checkpoint")
    tiny = np.float32(2.0**-10 + 2.0**-20)  # eleven digits, the last of them at 2^-20

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith(WRITERS):
                tensors[name] = torch.ones_like(tensor)
        tensors["model.embed_tokens.weight"][:3, 0] = float(tiny)

    edit_tensors(checkpoint, edit)
    for divisor, lost in ((16, 0), (32, 3)):
        options = replace(OPTIONS, stream_divisor=divisor)
        report = convert(checkpoint, tmp_path / str(divisor), options)
        assert report.stream.rounded == lost
        assert ("3 of" in stream_line(report.stream)) == bool(lost)


def test_scales_replace_each_other(large):
    model = open_model(large)
    inner = {1: InnerScale(values=1 / 4, ups=1 / 2)}
    assert with_scales(with_scales(model, 1 / 8, inner), 1.0, {}) == model


@pytest.mark.parametrize(
    ("stream", "sums", "divisor"),
    [
        (1000.0, 500.0, 1),
        (32752.0, 16376.0, 1),
        # gpt-oss-120b: 45,344 after layer 34 (onnxruntime-genai 2444), 58,820 + 33,760 after
        # layer 35 (hip-ep 168).
        (45344.0, 0.0, 2),
        (58820.0 + 33760.0, 33760.0, 4),
        (100.0, 33760.0, 4),
    ],
)
def test_what_is_needed(stream, sums, divisor):
    ranges = [LayerRange(0, 1.0, 1.0), LayerRange(34, stream, sums)]
    assert needed_divisor(ranges) == divisor
    scaled = [replace(one, stream=one.stream / 4, sums=one.sums / 4) for one in ranges]
    assert needed_divisor(scaled, 1 / 4) == divisor
    assert needed_divisor([]) == needed_divisor([LayerRange(0, math.inf, 1.0)]) == 1


def test_what_experts_give_apart_from_the_stream_counts_too():
    small, large = np.ones((3, 8), np.float32), np.full((3, 5), -70000.0, np.float32)
    layer = LayerGolden(small, small, small, experts_delta=large)
    assert range_of(0, layer) == LayerRange(0, 70000.0, 0.0)
    assert range_of(0, replace(layer, experts_delta=None)) == LayerRange(0, 3.0, 0.0)


def test_partial_sums_are_those_of_the_worst_order():
    generator = np.random.default_rng(0)
    x, matrix = generator.standard_normal((5, 40)), generator.standard_normal((8, 40))
    terms = x[:, None] * matrix[None]  # (5, 8, 40)
    expected = max(terms.clip(min=0).sum(-1).max(), -terms.clip(max=0).sum(-1).min())
    for compute in (
        lambda a, b: torch.nn.functional.linear(a, b),
        lambda a, b: a @ b.T,
        lambda a, b: torch.matmul(a, b.T),
    ):
        with PartialSums(8) as sums:
            compute(*(torch.from_numpy(one) for one in (x, matrix)))
        assert sums.largest == pytest.approx(expected, rel=1e-6)
    with PartialSums(9) as sums:
        torch.from_numpy(x) @ torch.from_numpy(matrix).T
    assert sums.largest == 0


@pytest.mark.parametrize("given", ["3", "x", "0", "-2"])
def test_other_divisors_are_refused(given, large, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(large), str(tmp_path / "out"), f"--stream-scale={given}"])
    assert ended.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
