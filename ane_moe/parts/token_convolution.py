"""Causal convolutions over tokens."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ane_moe.parts.residual import vector


class TokenConvolution(nn.Module):
    """`(1, C, 1, n + T) -> (1, C, 1, T)` with n + 1 taps, in groups of `width` channels."""

    def __init__(self, channels: int, width: int, taps: int, bias: bool = True):
        super().__init__()
        self.groups = channels // width
        self.weight = nn.Parameter(torch.empty(channels, width, 1, taps))
        self.bias = vector(channels) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight, groups=self.groups)
        return y if self.bias is None else y + self.bias
