"""Checkpoints trained at two bits: what training leaves is what a package holds, bit for bit."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ane_moe.formats.encoders import parse_format
from ane_moe.formats.expand import expand
from ane_moe.formats.recipe import find_recipe
from ane_moe.formats.two_levels import LARGEST_FIXED_SCALE
from tests.formats.test_compressed_conversion import expanded_by_coremltools
from tests.models import save_checkpoint
from tests.verification.tiny import tiny_conversion, tiny_model

SCRIPTS = Path(__file__).parents[2] / "scripts"
STEPS = 5
LEVELS = np.array([-1.5, -0.5, 0.5, 1.5], np.float32)
HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
SCALES = HALVES[(HALVES >= 2.0**-13) & (HALVES <= LARGEST_FIXED_SCALE)]


def snapped(rows: int, columns: int, group: int, seed: int) -> np.ndarray:
    """Levels times scales, any fp16 ones, as fp16 rounds them; some rows have one level alone."""
    random = np.random.default_rng(seed)
    scales = random.choice(SCALES, rows // group).repeat(group)[:, None].astype(np.float32)
    levels = random.choice(LEVELS, (rows, columns))
    levels[::3] = random.choice(LEVELS)
    return (levels * scales).astype(np.float16)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 33, 640]), st.booleans())
def test_rows_of_two_levels_are_taken_over_bit_for_bit(seed, columns, calibrated):
    moments = np.random.default_rng(seed).random(columns).astype(np.float32)
    for name, group in (("apple2", 1), ("apple2-g16", 16)):
        weight = snapped(32, columns, group, seed)
        encoded = parse_format(name).encode(weight, moments if calibrated else None)
        assert encoded is not None and expand(encoded).tobytes() == weight.tobytes()


def test_every_scale_of_fp16_is_found_again():
    weight = (SCALES[:, None].astype(np.float32) * LEVELS).astype(np.float16)
    assert expand(parse_format("apple2").encode(weight)).tobytes() == weight.tobytes()


def test_one_number_off_the_levels_makes_a_row_one_that_is_fitted():
    """Its neighbours in the matrix stay what they are."""
    weight = snapped(8, 64, 1, seed=0)
    weight[4, 9] = np.nextafter(weight[4, 9], np.float16(np.inf))
    found = expand(parse_format("apple2").encode(weight))
    assert not np.array_equal(found[4], weight[4])
    others = [row for row in range(8) if row != 4]
    assert found[others].tobytes() == weight[others].tobytes()


@pytest.fixture
def scripts(monkeypatch):
    """What scripts import from beside them."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("two_bits"), importlib.import_module("demo_training")


@pytest.fixture
def trained(scripts, tmp_path) -> tuple[torch.nn.Module, Path]:
    """A tiny model after some steps, and its checkpoint."""
    two_bits, training = scripts
    torch.set_num_threads(1)
    model = two_bits.TwoBitModel(tiny_model("qwen3_moe", tie_word_embeddings=True))
    ids = torch.randint(61, (4, 16), generator=torch.Generator().manual_seed(0))
    clips = [clip.detach().clone() for clip in model.clips]

    class Pace:
        steps, batch, warmup_steps = STEPS, 2, 1
        learning_rate, weight_decay, gradient_clip = 1e-2, 0.0, 1.0

    training.train_on_text(model, model, iter([*ids] * STEPS), Pace())
    assert all(not torch.equal(*pair) for pair in zip(clips, model.clips, strict=True))
    with torch.no_grad():
        model.meant = model(ids)
    return model, save_checkpoint(model.snapped().half(), tmp_path / "checkpoint")


def test_the_package_of_a_trained_checkpoint_has_its_weights_bit_for_bit(trained, tmp_path):
    _, checkpoint = trained
    out = tiny_conversion(checkpoint, tmp_path / "out", recipe=find_recipe("apple2"))
    stored = load_file(checkpoint / "model.safetensors")
    meant = [tensor.numpy().tobytes() for tensor in stored.values()]
    seen = 0
    for package in sorted(out.rglob("*.mlpackage")):
        (weights,) = expanded_by_coremltools(package).values()
        matrices = {name: value for name, value in weights.items() if value.ndim == 4}
        for name, value in matrices.items():
            found = value.astype(np.float16).tobytes()  # of the head some of its rows
            assert any(found in one for one in meant), name
        seen += len(matrices)
    assert seen == 4 + 4 * 3 + 2  # attention, experts, head


def test_a_checkpoint_computes_what_was_trained(trained):
    """Up to scales, norms and the router, which fp16 rounds."""
    model, checkpoint = trained
    ids = torch.randint(61, (4, 16), generator=torch.Generator().manual_seed(0))
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        found = loaded(ids).logits
    assert torch.nn.functional.cosine_similarity(found, model.meant, dim=-1).min() > 0.9999


def test_gradients_pass_through_rounding_and_stop_where_weights_are_cut_off(scripts):
    """By hand: the scale is 1 and the levels -0.5, 1.5, 1.5; the last weight is beyond them."""
    weight = torch.tensor([[-0.2, 1.2, 4.0]], requires_grad=True)
    levels, scale = scripts[0]._rounded(weight, torch.tensor([[0.5]]))
    assert levels.tolist() == [[-0.5, 1.5, 1.5]] and scale.tolist() == [[1.0]]
    (levels * scale).sum().backward()
    assert weight.grad.tolist() == [[1.0, 1.0, 0.0]]
