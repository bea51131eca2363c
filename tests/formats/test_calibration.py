"""Calibration against Hugging Face's own modules, and formats chosen by it against brute force."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ane_moe.checkpoints.checkpoint import open_checkpoint
from ane_moe.errors import UserError
from ane_moe.families import describe
from ane_moe.formats.budget import Option, Sensitivity, fit_budget, reach_cosine
from ane_moe.formats.calibration import FILE_NAME, Calibration, Moments
from ane_moe.formats.recipe import find_recipe
from ane_moe.manifest import read_manifest
from ane_moe.model.weight import HEAD, parse_name
from ane_moe.opened import open_model
from ane_moe.original.calibrate import calibrate
from ane_moe.original.stored_weights import stored_weights
from ane_moe.verification.verify import verify
from tests.models import FAMILIES, make_model, save_checkpoint
from tests.verification.tiny import tiny_checkpoint, tiny_conversion
from tests.zoo import FULL

PROMPTS = "[[3, 5, 8, 13, 21, 34, 55], [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22]]"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "ids.json"
    path.write_text(PROMPTS)
    return path


HEADS = ("lm_head", "score")


@pytest.mark.parametrize("family", ["mistral_large4", "qwen3_vl_moe", "qwen3_5_moe"])
def test_a_language_model_inside_another_model_is_heard_too(family, tmp_path, text):
    model = make_model(family)
    calibration = calibrate(open_model(save_checkpoint(model, tmp_path / "checkpoint")), text)
    heard: list[torch.Tensor] = []
    model.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: heard.append(args[0][0])
    )
    with torch.no_grad():
        for ids in json.loads(PROMPTS):
            model(input_ids=torch.tensor([ids]), use_cache=False)
    expected = torch.cat(heard).double().square().mean(0)
    moments = {str(name): values for name, values in calibration.moments.items()}
    np.testing.assert_allclose(moments["head.x"], expected, rtol=1e-4)
    assert "layers.0.attn.x" in moments and "layers.0.attn.attended" in moments


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_the_mean_squares_of_what_hugging_face_computes(family, tmp_path, text):
    model = make_model(family, num_hidden_layers=2)
    calibration = calibrate(open_model(save_checkpoint(model, tmp_path / "checkpoint")), text)
    heard: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "o_proj", "in_proj", "out_proj", *HEADS)):
            module.register_forward_pre_hook(
                lambda _, args, name=name: heard.setdefault(name, []).append(args[0][0])
            )
    with torch.no_grad():
        for ids in json.loads(PROMPTS):
            model(input_ids=torch.tensor([ids]), use_cache=False)
    assert len(heard) >= 5 and set(HEADS) & set(heard)
    for theirs, inputs in heard.items():
        if theirs in HEADS:
            ours = "head.x"
        elif ".mlp." in theirs:  # a router's
            continue
        else:
            reads = "x" if theirs.endswith(("q_proj", "in_proj")) else "attended"
            ours = f"layers.{theirs.split('.')[2]}.attn.{reads}"
        expected = torch.cat(inputs).square().mean(0).numpy()
        assert np.allclose(calibration.moments[parse_name(ours)], expected, rtol=1e-3, atol=1e-7), (
            ours
        )
    k = getattr(model.config, "num_experts_per_tok", None)
    assert (
        all(counts.sum() == k * 18 for counts in calibration.counts.values())
        and calibration.tokens == 18
    )


def test_what_enters_and_leaves_a_latent_is_heard(tmp_path, text):
    model = make_model("nemotron_h", moe_latent_size=56, layers_block_type=["moe", FULL])
    calibration = calibrate(open_model(save_checkpoint(model, tmp_path / "checkpoint")), text)
    block, heard = model.model.layers[0].mixer, {"x": [], "mixed": [], "experts": [], "chosen": []}
    for name, module in (("x", block.fc1_latent_proj), ("mixed", block.fc2_latent_proj)):
        module.register_forward_pre_hook(lambda _, args, own=heard[name]: own.append(args[0]))
    block.experts.register_forward_pre_hook(lambda _, args: heard["experts"].append(args[0]))
    block.experts.register_forward_pre_hook(lambda _, args: heard["chosen"].append(args[1]))
    with torch.no_grad():
        for ids in json.loads(PROMPTS):
            model(input_ids=torch.tensor([ids]), use_cache=False)
    whole = {name: torch.cat(parts) for name, parts in heard.items()}
    expert = int(whole["chosen"][0, 0])
    taken = whole["experts"][(whole["chosen"] == expert).any(1)]
    moments = {str(name): values for name, values in calibration.moments.items()}
    for name, entered in (
        ("layers.0.ffn.x", whole["x"]),
        ("layers.0.ffn.mixed", whole["mixed"]),
        (f"layers.0.ffn.experts.{expert}.x", taken),
    ):
        expected = entered.double().square().mean(0)
        np.testing.assert_allclose(moments[name], expected, rtol=1e-4, atol=1e-9)


def silu_of(experts, expert, x):
    gate, up = torch.nn.functional.linear(x, experts.gate_up_proj[expert]).chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def clamped_of(experts, expert, x):
    return experts._apply_gate(x @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert])


@pytest.mark.parametrize(
    ("family", "hidden_of"), [("qwen3_moe", silu_of), ("openai_privacy_filter", clamped_of)]
)
def test_what_enters_down_is_what_the_expert_makes(family, hidden_of, tmp_path, text):
    own = {"mlp_only_layers": []} if family == "qwen3_moe" else {}
    model = make_model(family, num_hidden_layers=1, **own)
    checkpoint = save_checkpoint(model, tmp_path / "checkpoint")
    heard: list[tuple[torch.Tensor, ...]] = []
    block = model.model.layers[0].mlp
    block.experts.register_forward_pre_hook(lambda _, args: heard.append(args))
    with torch.no_grad():
        for ids in json.loads(PROMPTS):
            model(input_ids=torch.tensor([ids]), use_cache=False)
    calibration, seen = calibrate(open_model(checkpoint), text), 0
    for expert, count in enumerate(calibration.counts[0]):
        hidden = parse_name(f"layers.0.ffn.experts.{expert}.hidden")
        inputs = torch.cat([x[(chosen == expert).any(1)] for x, chosen, _ in heard])
        assert len(inputs) == count
        if count:
            expected = hidden_of(block.experts, expert, inputs).square().mean(0).detach().numpy()
            found = calibration.moments[hidden]
            assert np.allclose(
                found, expected, rtol=2e-2, atol=1e-4 * expected.mean()
            )  # our weights are fp16
            seen += 1
        else:
            assert hidden not in calibration.moments
    assert seen > 2


def test_moments_are_read_by_name_and_shared_by_matrices_with_one_input(tmp_path):
    model = open_model(save_checkpoint(make_model("mixtral"), tmp_path / "checkpoint"))
    moments = {
        parse_name("layers.0.attn.x"): np.arange(4.0),
        parse_name("layers.0.ffn.experts.1.x"): np.ones(4),
        parse_name("layers.0.ffn.experts.2.x"): np.zeros(4),
    }
    counts, energies = {0: np.array([0, 3, 1])}, {0: np.array([2.0, 4.0])}
    ranges = {0: np.array([500.0, 70.0, 3.0, 2.0, 1.0])}
    calibration = Calibration(moments, counts, energies, ranges, 8.0, 2, "x")
    calibration.write(tmp_path / FILE_NAME)
    read = Moments(tmp_path / FILE_NAME)
    assert (
        read.tokens == 2 and read.of == "x" and read.ranges() == {0: [500.0, 70.0, 3.0, 2.0, 1.0]}
    )

    def find(tensor: str) -> np.ndarray | None:
        return read.find(model.sources[parse_name(tensor)].reads, 4)

    assert np.array_equal(find("layers.0.attn.v.weight"), np.arange(4))
    assert np.array_equal(find("layers.0.ffn.experts.1.up.weight"), np.ones(4))
    assert (
        find("layers.0.ffn.experts.2.up.weight") is None and find("layers.0.attn.o.weight") is None
    )
    assert read.share(HEAD) == 1 and read.share(parse_name("layers.0.attn.o.weight")) == 0.25
    assert read.share(parse_name("layers.0.ffn.experts.1.down.weight")) == pytest.approx(
        0.5 * 3 / 4
    )
    with pytest.raises(UserError, match="does not fit"):
        read.find(parse_name("layers.0.attn.x"), 5)
    (tmp_path / FILE_NAME).write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        Moments(tmp_path / FILE_NAME)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_budget_is_kept_and_no_single_step_was_wasted(data):
    """Against all combinations: the error is at most that of the best one for a budget smaller by
    one step."""
    matrices = [
        Sensitivity(
            str(n),
            tuple(
                Option(f"f{size}", size, data.draw(st.integers(0, 100)) / 10 + 100 / size, 1.0)
                for size in data.draw(
                    st.lists(st.integers(1, 40), min_size=1, max_size=4, unique=True)
                )
            ),
        )
        for n in range(3)
    ]
    least = sum(min(option.stored_bytes for option in entry.options) for entry in matrices)
    budget = data.draw(st.integers(least, 130))
    chosen = fit_budget(matrices, budget)
    options = [{option.format: option for option in entry.options} for entry in matrices]
    mine = [options[n][chosen[str(n)]] for n in range(3)]
    assert sum(option.stored_bytes for option in mine) <= budget
    step = max(option.stored_bytes for entry in matrices for option in entry.options)
    within = [
        sum(o.error for o in combination)
        for combination in itertools.product(*(e.options for e in matrices))
        if sum(o.stored_bytes for o in combination) <= budget - step
    ]
    assert not within or sum(option.error for option in mine) <= min(within) + 1e-9
    with pytest.raises(UserError, match="--budget-mb is too small"):
        fit_budget(matrices, least - 1)


def test_a_least_cosine_takes_the_smallest_format_that_keeps_it():
    options = (
        Option("fp16", 16, 0, 1.0),
        Option("int8", 8, 0.1, 0.999),
        Option("lut4", 4, 0.2, 0.99),
    )
    assert reach_cosine([Sensitivity("a", options)], 0.995) == {"a": "int8"}
    assert reach_cosine([Sensitivity("a", options)], 0.9999) == {"a": "fp16"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return tiny_checkpoint("qwen3_moe", tmp_path_factory.mktemp("checkpoint"))


def test_a_conversion_fits_its_budget_and_tells_conversion_from_compression(checkpoint, tmp_path):
    whole = tiny_conversion(checkpoint, tmp_path / "whole")
    size = (
        sum(shard.weight_bytes for shard in read_manifest(whole).shards)
        + (whole / "embed.bin").stat().st_size
    )
    options = {"budget_mb": size * 0.62 / 1e6, "golden": True}
    out = tiny_conversion(checkpoint, tmp_path / "out", **options)
    manifest = read_manifest(out)
    packages = [(out / shard.path).stat().st_ino for shard in manifest.shards]
    tiny_conversion(checkpoint, out, **options)
    assert packages == [(out / shard.path).stat().st_ino for shard in read_manifest(out).shards]
    stored = (
        sum(shard.weight_bytes for shard in manifest.shards) + (out / "embed.bin").stat().st_size
    )
    assert stored <= size * 0.62 and FILE_NAME in manifest.files
    assert len(set(manifest.recipe["overrides"].values())) > 1
    report = verify(out, runtime="reference")
    assert report.as_stored is not None and not report.as_stored.failures
    assert report.cause in (None, "compression")


def test_calibration_moves_the_error_to_inputs_that_do_not_matter(checkpoint, tmp_path):
    originals = open_checkpoint(checkpoint)
    _, sources = describe(originals)
    errors = {}
    for asked in (None, "builtin"):
        out = tiny_conversion(
            checkpoint, tmp_path / str(asked), recipe=find_recipe("lut3"), calibrate=asked
        )
        errors[asked] = {
            weight.name: (
                weight.value.reshape(-1, weight.value.shape[1]).astype(np.float64)
                - originals.read(sources[weight.name])
            )
            ** 2
            for weight in stored_weights(read_manifest(out).shards, out)
            if weight.name.expert is not None
        }
    moments = Moments(tmp_path / "builtin" / FILE_NAME)
    found = {
        name: moments.find(sources[name].reads, plain.shape[1])
        for name, plain in errors[None].items()
    }
    met = {name: squares for name, squares in found.items() if squares is not None}
    plain, calibrated = (
        [(errors[asked][name] @ m).sum() for name, m in met.items()] for asked in (None, "builtin")
    )
    assert sum(calibrated) < sum(plain)
    assert (
        np.mean([after < before for before, after in zip(plain, calibrated, strict=True)]) > 0.7
    )  # local optima


def test_bad_options_end_before_anything_is_written(checkpoint, tmp_path):
    for options in (
        {"calibrate": str(tmp_path / "none.txt")},
        {"budget_mb": 1.0, "min_cosine": 0.9},
    ):
        with pytest.raises(UserError):
            tiny_conversion(checkpoint, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
