"""Delta nets that decay by head and by channel, against transformers' own recurrences; and what
holds for lightning attention, too."""

import numpy as np
import pytest
import torch
from transformers.models.kimi_linear.modeling_kimi_linear import recurrent_kimi_delta_attention
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_recurrent_gated_delta_rule as recurrent_by_head,
)

from ane_moe.model.delta_net import DeltaNetConfig, DeltaNetSpec
from ane_moe.model.kda import KdaConfig, KdaSpec
from ane_moe.model.lightning import LightningConfig, LightningSpec
from ane_moe.model.spec import NormSpec
from ane_moe.parts import delta_net
from ane_moe.parts.delta_net import UNIT, chunk, inverted, lost, one_step, softplus, unit
from ane_moe.parts.kda import sigmoid
from tests.parts.padding import a_block, assert_padding_counts_for_nothing

HEADS, KEY, VALUE, TOKENS = 3, 32, 20, 150
SPEC = DeltaNetSpec(2, 6, KEY, VALUE, 4, 1e-6)
CONFIGS = [
    DeltaNetConfig(24, NormSpec(), SPEC, slots=32, explicit=True),
    KdaConfig(24, NormSpec(), KdaSpec(3, 3, KEY, KEY, 4, 1e-6, rank=8), slots=32, explicit=True),
    KdaConfig(24, NormSpec(), KdaSpec(3, 3, KEY, KEY, 2, 1e-6, floor=5), slots=32, explicit=True),
    LightningConfig(24, NormSpec(), LightningSpec(3, KEY, 1e-6), slots=32, explicit=True),
]
BY_HEAD, BY_CHANNEL = "by head", "by channel"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def a_sequence(fastest: float, alike: bool, decays: str = BY_HEAD):
    """Queries, keys, values, logarithms of decays and betas, each `(1, N, H, ...)`. `alike`: keys
    that hardly differ, all of which overwrite what was there."""
    random = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, TOKENS, HEADS, width, generator=random) for width in (KEY, KEY, VALUE)
    )
    beta = torch.rand(1, TOKENS, HEADS, generator=random)
    if alike:
        k, beta = k[:, :1] + 0.01 * k, 0.95 + 0.05 * beta
    channels = (KEY,) if decays == BY_CHANNEL else ()
    return q, k, v, -fastest * torch.rand(1, TOKENS, HEADS, *channels, generator=random), beta


def recurrence(q, k, v, decay, beta):
    """What transformers gives, and its memory."""
    rule = recurrent_kimi_delta_attention if decay.dim() == 4 else recurrent_by_head
    return rule(q, k, v, decay, beta, None, True, True)


def in_calls(sequence, tokens: int, dtype):
    """Ours over calls of so many tokens, the last one padded with what must not count."""
    q, k, v, decay, beta = sequence
    decay = decay if decay.dim() == 4 else decay[..., None]
    rows = [x.permute(0, 2, 3, 1) for x in (q, k, v, beta[..., None], -UNIT * decay)]
    memory, given = torch.zeros(1, HEADS, VALUE, KEY, dtype=dtype), []
    for first in range(0, TOKENS, tokens):
        count = min(tokens, TOKENS - first)
        own = [x[..., first : first + count].to(dtype) for x in rows]
        own = [torch.nn.functional.pad(x, (0, tokens - count)) for x in own]
        for x in own[:3]:
            x[..., count:] = 7
        q, k, v, beta, decay = own
        take_in = one_step if tokens == 1 else chunk
        values, change = take_in(memory, unit(q), unit(k), v, beta, decay)
        memory = memory + change
        given.append(values[..., :count])
    return torch.cat(given, dim=3).permute(0, 3, 1, 2) * KEY**-0.5, memory.transpose(2, 3)


@pytest.mark.parametrize("decays", [BY_HEAD, BY_CHANNEL])
@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("fastest", [0.01, 1.0, 20.0])
@pytest.mark.parametrize("tokens", [1, 2, 7, 64, TOKENS])
def test_calls_of_any_width_compute_the_recurrence(tokens, fastest, alike, decays):
    sequence = a_sequence(fastest, alike, decays)
    expected, memory = recurrence(*sequence)
    # Decays by channel are in the keys before these meet, whose rounding a system magnifies where
    # keys are alike.
    half = 2e-2 if alike and decays == BY_CHANNEL else 1e-2
    for dtype, near in ((torch.float32, 2e-6), (torch.float16, half)):
        given, kept = in_calls(sequence, tokens, dtype)
        assert (given - expected).abs().max() < near * expected.abs().max()
        assert (kept - memory).abs().max() < near * memory.abs().max()


@pytest.mark.parametrize("decays", [BY_HEAD, BY_CHANNEL])
@pytest.mark.parametrize("wrong", ["inverted", "left", "lost", "unit"])
def test_a_part_that_is_left_out_is_seen(wrong, decays, monkeypatch):
    sequence = a_sequence(1.0, alike=False, decays=decays)
    expected, _ = recurrence(*sequence)
    instead = {
        "inverted": lambda above, tokens: torch.eye(tokens).expand_as(above),
        "left": torch.ones_like,
        "lost": torch.zeros_like,
        "unit": lambda x: x / x.shape[2] ** 0.5,
    }
    monkeypatch.setattr(delta_net, wrong, instead[wrong])
    monkeypatch.setitem(globals(), wrong, instead[wrong])
    given, _ = in_calls(sequence, 64, torch.float32)
    assert (given - expected).abs().max() > 1e-2 * expected.abs().max()


def test_one_decay_for_all_channels_is_that_of_a_head():
    q, k, v, decay, beta = a_sequence(1.0, alike=False)
    by_head, _ = in_calls((q, k, v, decay, beta), 64, torch.float32)
    spread = decay[..., None].expand(-1, -1, -1, KEY)
    by_channel, _ = in_calls((q, k, v, spread, beta), 64, torch.float32)
    assert (by_head - by_channel).abs().max() < 2e-6 * by_head.abs().max()


def test_an_inverse_stays_in_fp16_where_powers_would_not():
    """Keys that are one: powers of the matrix pass 10^17, its inverse has no number above 1."""
    above = torch.ones(64, 64).triu(1)
    assert torch.linalg.matrix_power(above, 32).max() > 1e17
    exact = np.linalg.inv(np.eye(64) + above.double().numpy())
    assert np.abs(inverted(above.half()[None, None], 64)[0, 0].numpy() - exact).max() < 1e-3
    random = (0.5 * torch.rand(64, 64, generator=torch.Generator().manual_seed(1))).triu(1)
    exact = np.linalg.inv(np.eye(64) + random.double().numpy())
    found = inverted(random.half()[None, None], 64)[0, 0].numpy()
    assert np.abs(found - exact).max() < 2e-2 * np.abs(exact).max()


def test_slow_decays_are_exact_in_fp16():
    x = torch.linspace(-9, 30, 500).half()
    exact = torch.nn.functional.softplus(x.double())
    assert ((softplus(x) - exact) / exact).abs().max() < 4e-3
    decay = torch.logspace(-4, 1.5, 200).half()
    exact = torch.expm1(-decay.double())
    assert ((lost(decay * UNIT) - exact) / exact).abs().max() < 3e-3
    assert torch.exp(-decay[0]) == 1  # fp16 has no number for what is left


def test_small_shares_are_exact_in_fp16():
    x = torch.linspace(-9, 30, 500).half()
    exact = torch.sigmoid(x.double())
    assert ((sigmoid(x) - exact) / exact).abs().max() < 4e-3


def test_a_sum_of_thousands_of_tokens_notices_the_next_one():
    """What is rounded away of lightning attention's memory comes back."""
    config = CONFIGS[-1]
    block = a_block(config)
    block.slope.weight.data.fill_(0)
    states = {port.name: torch.zeros(port.shape).half() for port in config.states}
    change = 0.3 * torch.rand(states["memory"].shape, generator=torch.Generator().manual_seed(0))
    plain = states["memory"]
    for _ in range(6000):
        states = block.kept(change.half(), states)
        plain = plain + change.half()
    exact = 6000 * change.half().double()
    assert ((states["memory"] - exact).abs() <= 1).all()  # steps of fp16 up to 2048
    assert ((plain - exact).abs() > 100).any()


@pytest.mark.parametrize("config", CONFIGS)
def test_padding_changes_neither_results_nor_states(config):
    assert_padding_counts_for_nothing(config)
