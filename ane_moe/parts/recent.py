"""What a part keeps of the last n tokens, in the columns that model/recent.py gives its state."""

import torch
from torch import Tensor


def joined(state: str, new: Tensor, count: int, inputs: dict[str, Tensor]) -> Tensor:
    """The last `count` tokens before the call and then its own, `(1, C, 1, n + T)`."""
    return torch.cat([inputs[state][:, :, :, :count], new], dim=3)


def advanced(
    state: str, seen: Tensor, shift: str, inputs: dict[str, Tensor], explicit: bool
) -> Tensor:
    """The state after the call, out of what `joined` gave."""
    last = seen @ inputs[shift]
    return last if explicit else inputs[state].mul_(0).add_(last)
