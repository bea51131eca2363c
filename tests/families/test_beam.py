"""Beam's growing queries, which short texts hardly show."""

import numpy as np
import torch
from transformers.models.beam.modeling_beam import compute_attention_scaling

from ane_moe.families.beam import GROWS
from ane_moe.loop.buffers import RULES, Placement
from ane_moe.model.attention import passed_port
from ane_moe.parts.attention import factor_of


def test_queries_grow_as_hugging_faces_do() -> None:
    for position in (0, 100, 2047, 5000, 8192 - 64):
        port = passed_port(GROWS, 64)
        passed = np.zeros(port.shape, np.float32)
        RULES[port.root](passed, port.slot, Placement(position, 64, {}))
        ours = factor_of(GROWS, torch.from_numpy(passed)).reshape(-1)
        expected = compute_attention_scaling(torch.arange(position, position + 64)[None])
        assert torch.allclose(ours, expected.reshape(-1), rtol=1e-6, atol=0)
        assert position == 0 or ours[0] > 1.004
