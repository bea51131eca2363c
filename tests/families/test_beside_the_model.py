"""Checkpoints whose files hold more than the language model, or less than transformers' module of
it."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ane_moe.checkpoints.checkpoint import open_checkpoint
from ane_moe.families import beside, describe
from ane_moe.original.capture import capture_golden
from ane_moe.original.golden import read_golden
from tests.models import make_model, save_checkpoint
from tests.torch_model import TorchModel

IDS = np.random.default_rng(0).integers(3, 211, 24).tolist()
NEAR = 4e-5  # two implementations in fp32


def changed(folder: Path, change) -> Path:
    """The checkpoint with its tensors as `change` gives them."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})
    return folder


def golden_logits(folder: Path) -> np.ndarray:
    """What our stream of Hugging Face's model computes."""
    out = folder / "golden.safetensors"
    checkpoint = open_checkpoint(folder)
    capture_golden(checkpoint, layers=(0, 1), prompts=[IDS], out=out, experts=True)
    return read_golden(out).logits


def test_a_xk1_is_read_as_it_is_released(tmp_path: Path) -> None:
    """Without a bias for the choice, which is zero then, and with a norm for dense layers too."""
    model = make_model("axk1")
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.zero_()
        expected = model(torch.tensor([IDS])).logits[0].numpy()
    folder = save_checkpoint(model, tmp_path)
    whole, _ = describe(open_checkpoint(folder))
    norm = "model.layers.0.post_mlp_layernorm.weight"
    changed(
        folder,
        lambda tensors: (
            {key: one for key, one in tensors.items() if not key.endswith("correction_bias")}
            | {norm: torch.ones(72)}
        ),
    )
    checkpoint = open_checkpoint(folder)
    spec, sources = describe(checkpoint)
    assert whole.layers[1].ffn.router.bias and not spec.layers[1].ffn.router.bias
    assert checkpoint.left_out(sources, beside=beside("axk1")) == {
        "norms that dense layers do not use": (norm,)
    }
    assert np.abs(TorchModel(folder).logits(IDS) - expected).max() < NEAR
    assert np.abs(golden_logits(folder) - expected).max() < NEAR


def test_what_speaks_is_left_out_of_an_omni_model(tmp_path: Path) -> None:
    """A second decoder is no reason to doubt which one writes."""
    model = make_model("qwen3_omni_moe")
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0].numpy()
    folder = save_checkpoint(model, tmp_path)
    spec, _ = describe(open_checkpoint(folder))
    speaks = [
        "talker.model.layers.0.input_layernorm.weight",
        "talker.model.norm.weight",
        "code2wav.pre_transformer.layers.0.input_layernorm.weight",
        "code2wav.pre_transformer.norm.weight",
    ]
    changed(folder, lambda tensors: tensors | {name: torch.ones(8) for name in speaks})
    checkpoint = open_checkpoint(folder)
    again, sources = describe(checkpoint)
    left = checkpoint.left_out(sources)
    assert again == spec
    assert set(left) == {"what speaks", "an audio tower", "a vision tower"}
    assert left["what speaks"] == tuple(sorted(speaks))
    assert np.abs(TorchModel(folder).logits(IDS) - expected).max() < NEAR
    assert np.abs(golden_logits(folder) - expected).max() < NEAR


def test_experts_for_images_are_left_out_by_name(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_checkpoint(make_model("ernie4_5_vl_moe"), tmp_path))
    _, sources = describe(checkpoint)
    images = checkpoint.left_out(sources, beside=beside("ernie4_5_vl_moe"))["experts for images"]
    assert len(images) == 12 * 3 + 1  # of the one sparse layer, and their router
    assert "model.layers.1.mlp.experts.12.gate_proj.weight" in images
    assert "model.layers.1.mlp.gate.weight_1" in images
