"""What models of papers have in common, in plain PyTorch: norms, rotation, MLPs, experts and their
usual router, with Hugging Face's names for weights. None of it is of `parts/`.

d = width of what goes in, E = experts, k = experts per token, N = tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def rotated(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Heads `x` (B, heads, T, D) at `positions` (T): channel c of the first half of a head turns
    with channel c of the second."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * base ** (-torch.arange(half) / half)  # (T, D / 2)
    cos, sin = angles.cos(), angles.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class GatedMlp(nn.Module):
    def __init__(self, d: int, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(d, width, bias=False)
        self.up_proj = nn.Linear(d, width, bias=False)
        self.down_proj = nn.Linear(width, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        given: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return given


class Experts(nn.Module):
    """Every token goes to all the experts that it chose, however many others did: none is
    dropped."""

    def __init__(self, experts: int, d: int, width: int):
        super().__init__()
        self.num_experts = experts
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, d))
        self.down_proj = nn.Parameter(torch.empty(experts, d, width))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """`x` (N, d), `chosen` and `weights` (N, k)."""
        y = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            tokens, place = torch.where(chosen == expert)
            gate, up = F.linear(x[tokens], self.gate_up_proj[expert]).chunk(2, -1)
            given = F.linear(F.silu(gate) * up, self.down_proj[expert])
            y = y.index_add(0, tokens, given * weights[tokens, place, None])
        return y


class TopKRouter(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        self.k, self.renorm = config.num_experts_per_tok, config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For `x` (N, d) logits (N, E), and weights and numbers of the chosen experts (N, k)."""
        logits = F.linear(x, self.weight)
        return logits, *choice(logits, self.k, self.renorm)


def choice(logits: Tensor, k: int, renorm: bool) -> tuple[Tensor, Tensor]:
    """Weights and numbers of the k experts of the largest logits, (N, k) each."""
    weights, chosen = logits.softmax(-1).topk(k, -1)
    return (weights / weights.sum(-1, keepdim=True) if renorm else weights), chosen


class SparseMlp(nn.Module):
    def __init__(self, gate: nn.Module, experts: nn.Module):
        super().__init__()
        self.gate, self.experts = gate, experts

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        _, weights, chosen = self.gate(flat)
        given: Tensor = self.experts(flat, chosen, weights)
        return given.view_as(x)
