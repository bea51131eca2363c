"""Mamba, against transformers' own recurrence."""

import pytest
import torch
from torch.nn import functional as F
from transformers.models.jamba.modeling_jamba import mamba_selective_scan as scan

from ane_moe.model.mamba import MambaConfig, MambaSpec
from ane_moe.model.spec import NormSpec
from ane_moe.parts import mamba
from ane_moe.parts.mamba import PARTS, Decay, chunk, one_step
from tests.parts.padding import assert_padding_counts_for_nothing

CHANNELS, STATE, TOKENS = 24, 16, 150
SPEC = MambaSpec(48, STATE, 5, 4, 1e-5)
CONFIG = MambaConfig(24, NormSpec(), SPEC, slots=32, explicit=True)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def a_sequence(fastest: float):
    """u, steps `(1, C, N)`, b, c `(1, S, N)`, and the logarithms of rates `(C, S)`."""
    random = torch.Generator().manual_seed(0)
    u = torch.randn(1, CHANNELS, TOKENS, generator=random)
    step = torch.rand(1, CHANNELS, TOKENS, generator=random)
    b, c = (torch.randn(1, STATE, TOKENS, generator=random) for _ in range(2))
    return (
        u,
        step,
        b,
        c,
        torch.log(fastest * (0.01 + torch.rand(CHANNELS, STATE, generator=random))),
    )


def in_theirs(sequence):
    """What transformers gives, and its memory."""
    u, step, b, c, rates = sequence
    return scan(u, step, -rates.exp(), b, c, return_last_state=True, use_associative_scan=False)


def in_calls(sequence, tokens: int, dtype):
    """Ours over calls of so many tokens, the last one padded with what must not count."""
    u, step, b, c, rates = sequence
    decay = Decay(CHANNELS, STATE)
    decay.weight.data = rates.reshape(1, CHANNELS, STATE, 1).to(dtype)
    added = (u * step)[:, :, None] * b[:, None]
    columns = (c[:, None], added, PARTS * step[:, :, None])
    memory, given = torch.zeros(1, CHANNELS, STATE, 1, dtype=dtype), []
    for first in range(0, TOKENS, tokens):
        count = min(tokens, TOKENS - first)
        own = [x[..., first : first + count].to(dtype) for x in columns]
        own = [F.pad(x, (0, tokens - count)) for x in own]
        own[0][..., count:] = 7
        values, change = (one_step if tokens == 1 else chunk)(memory, *own, decay())
        memory = memory + change
        given.append(values[..., :count])
    return torch.cat(given, dim=3)[:, :, 0], memory[..., 0]


@torch.no_grad()
@pytest.mark.parametrize("fastest", [0.01, 1.0, 20.0])
@pytest.mark.parametrize("tokens", [1, 2, 7, 64, TOKENS])
def test_calls_of_any_width_compute_the_recurrence(tokens, fastest):
    sequence = a_sequence(fastest)
    expected, memory = in_theirs(sequence)
    for dtype, near in ((torch.float32, 2e-6), (torch.float16, 1e-2)):
        given, kept = in_calls(sequence, tokens, dtype)
        assert (given - expected).abs().max() < near * expected.abs().max()
        assert (kept - memory).abs().max() < near * memory.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("wrong", ["left", "lost"])
def test_a_part_that_is_left_out_is_seen(wrong, monkeypatch):
    sequence = a_sequence(1.0)
    expected, _ = in_theirs(sequence)
    instead = {"left": torch.ones_like, "lost": torch.zeros_like}
    monkeypatch.setattr(mamba, wrong, instead[wrong])
    given, _ = in_calls(sequence, 7, torch.float32)
    assert (given - expected).abs().max() > 1e-2 * expected.abs().max()


def test_padding_changes_neither_results_nor_states():
    assert_padding_counts_for_nothing(CONFIG)
