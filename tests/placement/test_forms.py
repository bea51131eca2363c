"""The forms that scripts/compare_forms.py compares: what it says of their results, and its table."""

import pytest
import torch
from torch import nn

from ane_moe.model.moe import MoeConfig
from ane_moe.model.norm import NormSpec
from ane_moe.model.spec import Clamp, MlpSpec, MoeSpec, RouterSpec
from ane_moe.parts.kv_cache import attend
from ane_moe.parts.moe import Moe
from ane_moe.parts.norm import RmsNorm
from ane_moe.parts.router import top_k_mask
from scripts.compare_forms import (
    FORMS,
    PRESETS,
    TABLE,
    WideExperts,
    fused,
    keys_first,
    lengths,
    mirrored,
    rounds_mask,
    side_by_side,
    sorted_mask,
    squares,
    total,
)


@pytest.fixture
def norm():
    norm = RmsNorm(64, 1e-6)
    norm.weight.data = torch.rand(1, 64, 1, 1)
    norm.channels = 64
    return norm


@pytest.mark.parametrize("form", [squares, mirrored, lengths])
def test_norms_are_the_same_norm_in_fp32(form, norm):
    x = torch.randn(1, 64, 1, 4)
    assert torch.allclose(form(norm, x), norm(x), atol=1e-5)


@pytest.mark.parametrize(("form", "finite"), [(squares, False), (lengths, True)])
def test_squares_of_the_numbers_themselves_leave_fp16(form, finite, norm):
    x, half = torch.full((1, 64, 1, 1), 300.0).half(), norm.half()
    assert bool((form(half, x).abs() > 0).all()) is finite


@pytest.mark.parametrize("form", [keys_first, fused])
def test_attention_is_the_same_for_one_token(form):
    q, keys, values = torch.randn(1, 8, 16, 1), torch.randn(1, 2, 16, 32), torch.randn(1, 2, 16, 32)
    mask = torch.where(torch.arange(32) < 20, 0.0, -1e4).reshape(1, 1, 1, 32)
    found = form(q, keys, values, mask, 0.25)
    assert torch.allclose(found, attend(q, keys, values, mask, 0.25), atol=1e-5)


@pytest.mark.parametrize("form", [sorted_mask, rounds_mask])
def test_masks_differ_where_experts_are_equal(form):
    scores = torch.tensor([4.0, 1.0, 3.0, 2.0]).reshape(1, 4, 1, 1)
    assert (form(scores, 2, 4) == top_k_mask(scores, 2, 4)).all()
    equal = torch.tensor([4.0, 3.0, 3.0, 2.0]).reshape(1, 4, 1, 1)
    assert (top_k_mask(equal, 2, 4).sum(), form(equal, 2, 4).sum()) == (2, 3)


def test_experts_side_by_side_give_what_they_give_one_by_one():
    expert = MlpSpec(6, bias=True, clamp=Clamp(7.0, 1.702))
    config = MoeConfig(8, NormSpec(), MoeSpec(RouterSpec(5, 2), expert), 5, True)
    ours, wide = Moe(config), Moe(config)
    wide.experts = nn.ModuleList([WideExperts(8, expert, 3), WideExperts(8, expert, 2)])
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    for name in ("norm", "router"):
        getattr(wide, name).load_state_dict(getattr(ours, name).state_dict())
    for first, group in ((0, wide.experts[0]), (3, wide.experts[1])):
        own = ours.experts[first : first + group.count]
        for name in ("gate", "up"):
            for kind in ("weight", "bias"):
                dim = 0 if kind == "weight" else 1
                values = torch.cat([getattr(getattr(one, name), kind) for one in own], dim)
                getattr(getattr(group.mlp, name), kind).data = values
        group.mlp.down.weight.data = torch.cat([one.down.weight for one in own], 1)
        group.biases.weight.data = torch.cat([one.down.bias[0] for one in own], 1)[..., None]
    x = torch.randn(1, 8, 1, 7)
    found, expected = side_by_side(wide, x=x), ours(x=x)
    assert torch.allclose(found["y"], expected["y"], atol=1e-5)


def test_the_documented_figures_are_what_the_script_gives():
    model, (ours, *_) = "granite-3.1-1b-a400m", FORMS
    found = total(PRESETS[model], ours, ("m4",))["m4"]
    (line,) = (row for row in TABLE.text.splitlines() if row.startswith(f"| {model} | ours "))
    assert f" {found.ms:.2f}, {found.runs} " in line
