"""Mamba-2, against transformers' own recurrence."""

import pytest
import torch
from torch.nn import functional as F
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import (
    mamba2_chunk_scan as dual_form,
)
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import (
    mamba2_selective_state_update as recurrence,
)

from ane_moe.model.mamba2 import Mamba2Config, Mamba2Spec
from ane_moe.model.spec import NormSpec
from ane_moe.parts import mamba2
from ane_moe.parts.delta_net import UNIT
from ane_moe.parts.mamba2 import chunk, one_step
from tests.parts.padding import assert_padding_counts_for_nothing

HEADS, WIDTH, GROUPS, STATE, TOKENS = 6, 20, 2, 32, 150
SPEC = Mamba2Spec(HEADS, WIDTH, GROUPS, STATE, 4, 1e-5)
CONFIG = Mamba2Config(24, NormSpec(), SPEC, slots=32, explicit=True)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def a_sequence(fastest: float):
    """u, b, c, steps, and the logarithms of what is left a step: each `(1, N, ...)`, by head."""
    random = torch.Generator().manual_seed(0)
    u = torch.randn(1, TOKENS, HEADS, WIDTH, generator=random)
    b, c = (torch.randn(1, TOKENS, GROUPS, STATE, generator=random) for _ in range(2))
    step = torch.rand(1, TOKENS, HEADS, generator=random)
    return u, b, c, step, -fastest * torch.rand(HEADS, generator=random)


def in_theirs(sequence):
    """What transformers gives one token after the other, and its memory."""
    u, b, c, step, decay = sequence
    memory, rows = torch.zeros(1, HEADS, WIDTH, STATE), []
    for t in range(TOKENS):
        by_channel = step[:, t, :, None].expand(-1, -1, WIDTH)
        rate = decay[:, None, None].expand(-1, WIDTH, STATE)
        rows.append(recurrence(memory, u[:, t], by_channel, rate, b[:, t], c[:, t]))
    return torch.stack(rows, dim=1), memory


def in_calls(sequence, tokens: int, dtype):
    """Ours over calls of so many tokens, the last one padded with what must not count."""
    u, b, c, step, decay = sequence
    step = step.permute(0, 2, 1)[:, :, None]  # (1, H, 1, N)
    decays = UNIT * step * -decay[:, None, None]
    added = u.permute(0, 2, 3, 1) * step
    columns = [x.permute(0, 2, 3, 1) for x in (b, c)]
    memory, given = torch.zeros(1, HEADS, WIDTH, STATE, dtype=dtype), []
    for first in range(0, TOKENS, tokens):
        count = min(tokens, TOKENS - first)
        own = [x[..., first : first + count].to(dtype) for x in (*columns, added, decays)]
        own = [F.pad(x, (0, tokens - count)) for x in own]
        for x in own[:2]:
            x[..., count:] = 7
        values, change = (one_step if tokens == 1 else chunk)(memory, *own)
        memory = memory + change
        given.append(values[..., :count])
    return torch.cat(given, dim=3).permute(0, 3, 1, 2), memory


@pytest.mark.parametrize("fastest", [0.01, 1.0, 20.0])
@pytest.mark.parametrize("tokens", [1, 2, 7, 64, TOKENS])
def test_calls_of_any_width_compute_the_recurrence(tokens, fastest):
    sequence = a_sequence(fastest)
    expected, memory = in_theirs(sequence)
    u, b, c, step, decay = sequence
    again, _ = dual_form(u, step, decay, b, c, 32, return_final_states=True)
    torch.testing.assert_close(again, expected, rtol=1e-3, atol=1e-3)
    for dtype, near in ((torch.float32, 2e-6), (torch.float16, 1e-2)):
        given, kept = in_calls(sequence, tokens, dtype)
        assert (given - expected).abs().max() < near * expected.abs().max()
        assert (kept - memory).abs().max() < near * memory.abs().max()


@pytest.mark.parametrize("wrong", ["left", "lost", "by_group"])
def test_a_part_that_is_left_out_is_seen(wrong, monkeypatch):
    sequence = a_sequence(1.0)
    expected, true = in_theirs(sequence)[0], mamba2.by_group
    instead = {
        "left": torch.ones_like,
        "lost": torch.zeros_like,
        "by_group": lambda heads, shared: true(heads.flip(1), shared),
    }
    monkeypatch.setattr(mamba2, wrong, instead[wrong])
    given, _ = in_calls(sequence, 7, torch.float32)
    assert (given - expected).abs().max() > 1e-2 * expected.abs().max()


def test_padding_changes_neither_results_nor_states():
    assert_padding_counts_for_nothing(CONFIG)
