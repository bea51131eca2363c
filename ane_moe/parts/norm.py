"""Normalisation that stays inside fp16."""

import torch
from torch import Tensor, nn

from ane_moe.model.spec import NormSpec
from ane_moe.parts.activation import silu
from ane_moe.parts.projection import Projection


class UnitNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps)` over one axis, for any finite fp16 `x`.

    Squares of fp16 overflow beyond 255, and an eps of 1e-6 is a subnormal. So both are divided by
    the token's own largest magnitude first, which leaves the quotient as it is: with m = max(|x|,
    sqrt(eps)), `(x/m) / sqrt(mean((x/m)^2) + (sqrt(eps)/m)^2)`. Every square is at most 1, and eps
    keeps its exact weight wherever it matters. A constant pre-scale would have to choose which end
    of the range to lose. `centred`: of what differs from the mean, which is taken of values no
    larger than 1.
    """

    def __init__(self, eps: float, axis: int = 1, centred: bool = False):
        super().__init__()
        self.axis = axis
        self.root_eps = eps**0.5
        self.centred = centred

    def forward(self, x: Tensor) -> Tensor:
        largest = x.abs().amax(self.axis, keepdim=True).clamp(min=self.root_eps)
        y = x / largest
        if self.centred:
            y = y - y.mean(self.axis, keepdim=True)
        # A quotient of two tensors: `scalar / tensor` converts to `inverse`, which adds an epsilon
        # of 1e-4.
        root = torch.full((1, 1, 1, 1), self.root_eps, dtype=x.dtype) / largest
        power = (y * y).mean(self.axis, keepdim=True) + root * root
        return y * torch.rsqrt(power)


class RmsNorm(UnitNorm):
    """The same times a weight by channel. Over axis 2 each of the `groups` on axis 1 may have its
    own weights."""

    def __init__(
        self, channels: int, eps: float, axis: int = 1, groups: int = 1, centred: bool = False
    ):
        super().__init__(eps, axis, centred)
        shape = [1, groups, 1, 1]
        shape[axis] = channels
        self.weight = nn.Parameter(torch.empty(shape))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.weight


class LayerNorm(RmsNorm):
    """`(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`: RmsNorm of what differs from the
    mean."""

    def __init__(self, channels: int, eps: float, bias: bool = True):
        super().__init__(channels, eps, centred=True)
        self.bias = nn.Parameter(torch.empty(1, channels, 1, 1)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        normed = super().forward(x)
        return normed if self.bias is None else normed + self.bias


class GatedNorm(RmsNorm):
    """RmsNorm whose result y is multiplied by `sigmoid(up(silu(down(y))))`."""

    def __init__(self, channels: int, eps: float, rank: int):
        super().__init__(channels, eps)
        self.gate_down = Projection(channels, rank)
        self.gate_up = Projection(rank, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * torch.sigmoid(self.gate_up(silu(self.gate_down(y))))


def make_norm(channels: int, spec: NormSpec) -> RmsNorm:
    """The module of a norm."""
    if spec.kind == "layer":
        return LayerNorm(channels, spec.eps, spec.bias)
    if spec.gate_rank:
        return GatedNorm(channels, spec.eps, spec.gate_rank)
    return RmsNorm(channels, spec.eps)
