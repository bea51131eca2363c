"""The router: exact top-k gates in a static graph."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ane_moe.model.eda_router import EdaRouterSpec
from ane_moe.model.sparse_mixer import SparseMixerSpec
from ane_moe.model.spec import AnyRouterSpec, RouterSpec
from ane_moe.parts.norm import RmsNorm
from ane_moe.parts.projection import Projection
from ane_moe.parts.residual import vector

# Larger than any router logit, and twice it is still inside fp16.
FAR = 2e4
# The smallest normal fp16 number. Scaled by 2^10, no two different fp16 numbers are nearer.
LEAST = 2**-14


# What logits `(1, E, 1, T)` become.
SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "logits": lambda logits: logits,
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits: torch.softmax(logits, dim=1),
}


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Kept within `softcap` by a tanh, where there is one."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def top_k_mask(logits: Tensor, k: int, experts: int, groups: int = 1) -> Tensor:
    """1 at the k largest of axis 1, 0 elsewhere; the lowest index wins ties. `(G, E, 1, T) -> (G,
    E, 1, T)`.

    An expert is chosen when fewer than k others come before it, so all pairs are compared at once:
    10 operations, where k rounds of maximum and mask with the same rule for ties take 13 each (an
    operation costs about 6 us on the engine, ane-guide chapter 9). `topk`, `gather` and comparisons
    leave the engine, so "is positive" is arithmetic:
    clipping at LEAST leaves just LEAST or 0, and every constant is a normal fp16 number.
    """
    # Of equal logits the one of lower index comes first.
    earlier = torch.ones(experts, experts).tril(-1) * LEAST
    ahead = (logits.reshape(groups, 1, experts, -1) - logits).clamp(
        -1, 1
    ) * 2**10  # (G, E, E, T): the other less this one
    wins = (ahead + earlier.to(logits.dtype).reshape(1, experts, experts, 1)).clamp(0, LEAST)
    return (k - wins.sum(2, keepdim=True) * 2**14).clamp(0, 1)


def idle_share(h: Tensor, gates: Tensor, spec: AnyRouterSpec) -> list[Tensor]:
    """What the idle experts among those chosen give for `h`, `(1, d, 1, T)`, where there are
    any."""
    if not isinstance(spec, RouterSpec) or not spec.idle:
        return []
    return [h * gates[:, spec.experts :].sum(1, keepdim=True)]


class Router(Projection):
    """Gates `(1, d, 1, T) -> (1, E, 1, T)`: zero outside the k chosen, or all scores if `soft`."""

    def __init__(self, d_model: int, spec: RouterSpec, soft: bool = False):
        super().__init__(d_model, spec.classes, spec.logit_bias)
        self.spec = spec
        self.soft = soft
        self.choice_bias = vector(spec.classes) if spec.bias and not soft else None
        self.expert_scale = vector(spec.experts) if spec.weighed else None

    def gates(self, x: Tensor, inputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        logits = capped(self(x), self.spec.softcap)
        return self._scaled(self._chosen(logits, inputs.get("noise"))), {}

    def _chosen(self, logits: Tensor, noise: Tensor | None) -> Tensor:
        spec = self.spec
        plain = not (spec.bias or spec.renorm_eps or spec.renorm_floor)
        if spec.score == "softmax" and plain and spec.open_groups == spec.groups:
            return self._softmax(logits, noise)
        scores = SCORES[spec.score](logits)
        ranked = logits if spec.by_logits else scores
        ranked = ranked if self.choice_bias is None else ranked + self.choice_bias
        ranked = ranked if noise is None else ranked + noise
        if spec.open_groups < spec.groups and not self.soft:
            ranked = self._in_open_groups(ranked)
        gates = scores if self.soft else scores * top_k_mask(ranked, spec.k, spec.classes)
        if not spec.renorm:
            return gates
        if spec.renorm_floor:
            return gates / gates.sum(1, keepdim=True).clamp(min=max(spec.renorm_floor, LEAST))
        return gates / (gates.sum(1, keepdim=True) + spec.renorm_eps)

    def _in_open_groups(self, ranked: Tensor) -> Tensor:
        """Scores as they are in the groups that are chosen from, and far below elsewhere."""
        groups, size = self.spec.groups, self.spec.experts // self.spec.groups
        by_group = ranked.reshape(groups, size, 1, -1)
        best = (by_group * top_k_mask(by_group, self.spec.group_best, size, groups)).sum(
            1, keepdim=True
        )
        is_open = top_k_mask(best.reshape(1, groups, 1, -1), self.spec.open_groups, groups)
        lowered = by_group + (is_open.reshape(groups, 1, 1, -1) - 1) * FAR
        return lowered.reshape(1, self.spec.experts, 1, -1)

    def _softmax(self, logits: Tensor, noise: Tensor | None) -> Tensor:
        if self.soft:
            return torch.softmax(logits, dim=1)
        ranked = logits if noise is None else logits + noise
        mask = top_k_mask(ranked, self.spec.k, self.spec.classes)
        if self.spec.renorm:  # a softmax over the chosen logits alone
            return torch.softmax(logits + (mask - 1) * FAR, dim=1)
        return torch.softmax(logits, dim=1) * mask

    def _scaled(self, gates: Tensor) -> Tensor:
        if self.expert_scale is not None:
            gates = gates * self.expert_scale
        return gates if self.spec.scale == 1 else gates * self.spec.scale


class EdaRouter(nn.Module):
    """Gates `(1, E + 1, 1, T)` of a small network over a state that goes from layer to layer, `(1,
    W, 1, T)`."""

    def __init__(self, d_model: int, spec: EdaRouterSpec, soft: bool = False):
        super().__init__()
        self.spec = spec
        self.choice_bias = None if soft else vector(spec.classes)
        if spec.takes:
            self.carry_scale = vector(spec.width)
        self.down = Projection(d_model, spec.width, bias=True)
        self.norm = RmsNorm(spec.width, spec.eps)
        self.fc1 = Projection(spec.width, spec.width, bias=True)
        self.fc2 = Projection(spec.width, spec.width, bias=True)
        self.out = Projection(spec.width, spec.classes)

    def gates(self, x: Tensor, inputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        state = self.down(x)
        if self.spec.takes:
            state = state + inputs["carry"] * self.carry_scale
        h = F.gelu(self.fc1(self.norm(state)))
        scores = torch.softmax(self.out(F.gelu(self.fc2(h))), dim=1)
        if self.choice_bias is not None:
            scores = scores * top_k_mask(scores + self.choice_bias, self.spec.k, self.spec.classes)
        return scores, {"carry_out": state}


class SparseMixer(Projection):
    """Gates `(1, d, 1, T) -> (1, E, 1, T)` of two experts, or the softmax of all if `soft`."""

    def __init__(self, d_model: int, spec: SparseMixerSpec, soft: bool = False):
        super().__init__(d_model, spec.experts)
        self.spec = spec
        self.soft = soft

    def gates(self, x: Tensor, inputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self(x)
        if self.soft:
            return torch.softmax(logits, dim=1), {}
        first = top_k_mask(logits, 1, self.spec.experts)
        second = top_k_mask(logits - first * FAR, 1, self.spec.experts)
        gates = first * self._share(logits, first, 1 - first * 0)
        return gates + second * self._share(logits, second, 1 - first), {}

    def _share(self, logits: Tensor, chosen: Tensor, left: Tensor) -> Tensor:
        """The weight of the chosen, `(1, 1, 1, T)`, among those `left` (1, else 0) and near."""
        largest = (logits * chosen).sum(1, keepdim=True)
        behind = largest - logits
        reach = torch.maximum(logits.abs(), largest) * (2 * self.spec.jitter)
        near = ((reach - behind).clamp(-LEAST, 0) + LEAST) * 2**14 * left
        return 1 / (torch.exp(-behind.clamp(min=0)) * near).sum(1, keepdim=True)


RouterModule = Router | EdaRouter | SparseMixer
ROUTERS: dict[type, Callable[..., RouterModule]] = {
    RouterSpec: Router,
    EdaRouterSpec: EdaRouter,
    SparseMixerSpec: SparseMixer,
}


def make_router(d_model: int, spec: AnyRouterSpec, soft: bool = False) -> RouterModule:
    return ROUTERS[type(spec)](d_model, spec, soft)
