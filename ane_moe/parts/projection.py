"""A linear map as a 1x1 convolution."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Projection(nn.Module):
    """`(1, in, 1, T) -> (1, out, 1, T)`. Channels may be 65,536 on every engine; a `linear` sums
    over no more than 16,384 before H16 (larql pull request 312). The bias is an addition of its
    own: Core ML's `conv` takes only constant biases, and weights are bound after conversion.

    A `rank` above 0 adds `recover_out(recover_in(x))`: directions kept apart from a weight that is
    compressed.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = False, rank: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 1, 1))
        self.bias = nn.Parameter(torch.empty(1, outputs, 1, 1)) if bias else None
        self.recover_in = nn.Parameter(torch.empty(rank, inputs, 1, 1)) if rank else None
        self.recover_out = nn.Parameter(torch.empty(outputs, rank, 1, 1)) if rank else None

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """`scale`, `(1, 1, 1, T)`, is what has multiplied `x`, and so multiplies the bias too."""
        y = F.conv2d(x, self.weight)
        if self.recover_in is not None and self.recover_out is not None:
            y = y + F.conv2d(F.conv2d(x, self.recover_in), self.recover_out)
        if self.bias is None:
            return y
        return y + (self.bias if scale is None else self.bias * scale)
