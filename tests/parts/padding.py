"""Calls of a mixer that keeps something: what padding must not change."""

import numpy as np
import torch

from ane_moe.loop.buffers import RULES, Placement
from ane_moe.parts.unbound import build_unbound


def a_block(config, seed: int = 0):
    block = build_unbound(config).to_empty(device="cpu").eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0, 0.4)
    return block


def call(block, x, position, tokens, states):
    """A call of so many tokens; columns of padding hold what was there before."""
    count = x.shape[3]
    given = torch.nn.functional.pad(x, (0, tokens - count), value=11.0)
    inputs = {"x": given, **states}
    for port in block.ports(tokens).inputs:
        if port.root in RULES:
            array = np.zeros(port.shape, np.float32)
            RULES[port.root](array, port.slot, Placement(position, count, {}))
            inputs[port.name] = torch.from_numpy(array)
    with torch.no_grad():
        outputs = block(**inputs)
    kept = {name: outputs[f"{name}_out"] for name in states}
    return outputs["y"][..., :count], kept


def assert_padding_counts_for_nothing(config):
    """And calls of one token end where a call of all of them does."""
    block, x = a_block(config), torch.randn(1, config.d_model, 1, 11)
    empty = {port.name: torch.zeros(port.shape) for port in config.states}
    whole, states = call(block, x, 0, 11, empty)
    padded, padded_states = call(block, x, 0, 16, empty)
    singles, one_by_one = [], empty
    for token in range(11):
        y, one_by_one = call(block, x[..., token : token + 1], token, 1, one_by_one)
        singles.append(y)
    for y, kept in ((padded, padded_states), (torch.cat(singles, dim=3), one_by_one)):
        torch.testing.assert_close(y, whole, rtol=1e-4, atol=1e-5)
        for name, state in states.items():
            torch.testing.assert_close(kept[name], state, rtol=1e-4, atol=1e-5)
    # Lightning attention's `rest` is what fp16 rounds away: in fp32 next to nothing.
    assert [name for name, state in states.items() if state.abs().max() < 0.01] in ([], ["rest"])
