"""A linear map as a 1x1 convolution."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Projection(nn.Module):
    """`(1, in, 1, T) -> (1, out, 1, T)`. Channels may be 65,536 on every engine; a `linear` sums over no more than
    16,384 before H16 (larql pull request 312). The bias is an addition of its own: Core ML's `conv` takes only
    constant biases, and weights are bound after conversion."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 1, 1))
        self.bias = nn.Parameter(torch.empty(1, outputs, 1, 1)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight)
        return y if self.bias is None else y + self.bias
