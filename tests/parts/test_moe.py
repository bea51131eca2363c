"""The MoE block against a loop over tokens and experts; parts against the whole."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from ane_moe.model.moe import MoeConfig
from ane_moe.model.spec import MlpSpec, MoeSpec, NormSpec, RouterSpec, SharedSpec
from ane_moe.parts.moe import Moe

D_MODEL, EXPERTS, TOKENS = 20, 6, 5
SPEC = MoeSpec(RouterSpec(EXPERTS, 2), MlpSpec(12), SharedSpec(MlpSpec(16), gated=True))
WHOLE = MoeConfig(D_MODEL, NormSpec(), SPEC, experts=EXPERTS, first=True)


def random_block(config: MoeConfig) -> Moe:
    torch.manual_seed(1)
    block = Moe(config).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return block


def by_token(block: Moe, x: torch.Tensor) -> torch.Tensor:
    """Top-k experts of each token by hand."""
    flat = {
        name: p.detach()[..., 0, 0]
        if p.shape[0] > 1 or (p.dim() == 4 and p.shape[1] > 1)
        else p.detach()
        for name, p in block.named_parameters()
    }

    def mlp(name: str, h: torch.Tensor) -> torch.Tensor:
        return flat[f"{name}.down.weight"] @ (
            F.silu(flat[f"{name}.gate.weight"] @ h) * (flat[f"{name}.up.weight"] @ h)
        )

    columns = []
    for t in range(x.shape[3]):
        column = x[0, :, 0, t]
        h = F.rms_norm(column, (D_MODEL,), block.norm.weight.detach().flatten(), 1e-6)
        weights, chosen = torch.topk(torch.softmax(flat["router.weight"] @ h, 0), SPEC.router.k)
        y = column + torch.sigmoid(block.shared_gate.weight.detach().flatten() @ h) * mlp(
            "shared", h
        )
        for weight, expert in zip(weights / weights.sum(), chosen.tolist(), strict=True):
            y = y + weight * mlp(f"experts.{expert}", h)
        columns.append(y)
    return torch.stack(columns, 1)[None, :, None]


@torch.no_grad()
def test_masked_experts_equal_a_loop_over_the_chosen_ones():
    block, x = random_block(WHOLE), torch.randn(1, D_MODEL, 1, TOKENS)
    torch.testing.assert_close(block(x=x)["y"], by_token(block, x), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[2, 2, 2], [4, 2], [1, 5]])
def test_the_parts_of_a_layer_sum_to_the_layer(sizes):
    whole, x = random_block(WHOLE), torch.randn(1, D_MODEL, 1, TOKENS)
    total, first = 0, 0
    for size in sizes:
        part = Moe(dataclasses.replace(WHOLE, experts=size, first=first == 0)).eval()
        weights = dict(whole.state_dict())
        for e in range(size):
            weights |= {
                name.replace(f"experts.{first + e}.", f"experts.{e}.", 1): value
                for name, value in whole.state_dict().items()
                if name.startswith(f"experts.{first + e}.")
            }
        weights["select.weight"] = torch.eye(EXPERTS)[first : first + size, :, None, None]
        part.load_state_dict({name: weights[name] for name in part.state_dict()})
        total = total + part(x=x)["y"]
        first += size
    torch.testing.assert_close(total, whole(x=x)["y"], atol=1e-4, rtol=1e-4)
