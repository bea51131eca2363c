"""Layers whose halves stand side by side, or of which experts alone are normed, in one graph with
others and in parts, against Hugging Face's own model in fp32."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.models import make_model, save_checkpoint
from tests.torch_model import TorchModel

IDS = np.random.default_rng(0).integers(3, 211, 24).tolist()
NEAR = 4e-5


@pytest.mark.parametrize("cut", [{"layers_per_shard": 2}, {"max_shard_mb": 0}])
@pytest.mark.parametrize("family", ["axk1", "cohere2_moe"])
def test_it_does_not_matter_how_layers_are_cut(family: str, cut: dict, tmp_path: Path) -> None:
    alike = {"layer_types": ["full_attention"] * 2} if family == "cohere2_moe" else {}
    model = make_model(family, **alike)
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0].numpy()
    ours = TorchModel(save_checkpoint(model, tmp_path), **cut)
    kinds = [shard.kind for shard in ours.plan.shards]
    if "max_shard_mb" in cut:
        assert kinds.count("moe") == 12 * (2 if family == "cohere2_moe" else 1)
        assert ("join" in kinds) == (family == "axk1")
    else:
        assert kinds.count("stack") == 1
    assert np.abs(ours.logits(IDS) - expected).max() < NEAR
