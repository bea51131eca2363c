"""What Mistral Large 4 has beyond Mistral 4: learned rotation, which is read of its weights, and what
is refused."""

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from ane_moe.checkpoints.checkpoint import open_checkpoint
from ane_moe.errors import UserError
from ane_moe.families import describe
from ane_moe.loop.buffers import RULES, Placement
from ane_moe.model.mla import MlaConfig
from ane_moe.model.norm import NormSpec
from tests.models import make_model, save_checkpoint


def test_the_rotary_table_is_hugging_faces(tmp_path):
    model = make_model("mistral_large4")
    spec, _ = describe(open_checkpoint(save_checkpoint(model, tmp_path)))
    rotary = model.model.language_model.rotary_emb
    turned = (rotary.inv_freq * rotary.alpha.exp()).numpy()
    np.testing.assert_allclose(spec.ropes["main"].inv_freq, turned, rtol=1e-6)
    assert np.abs(turned / rotary.inv_freq.numpy() - 1).max() > 0.1


def test_queries_grow_with_the_logarithm_of_their_place(tmp_path):
    """From 1 on: the first token's is 0."""
    spec, _ = describe(open_checkpoint(save_checkpoint(make_model("mistral_large4"), tmp_path)))
    config = MlaConfig(spec.d_model, NormSpec(), spec.layers[0].mixer, rotary=4, slots=32)
    port = next(port for port in config.host(4) if port.root == "passed")
    passed = np.zeros(port.shape, np.float32)
    RULES[port.root](passed, port.slot, Placement(5, 4, {}))
    np.testing.assert_allclose(passed[0, 0, 0], np.log([6, 7, 8, 9]), rtol=1e-6)


def test_a_file_without_factors_of_rotation_is_refused_by_name(tmp_path):
    checkpoint = save_checkpoint(make_model("mistral_large4"), tmp_path)
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    del tensors["lerope.alpha"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks lerope\.alpha"):
        describe(open_checkpoint(checkpoint))
