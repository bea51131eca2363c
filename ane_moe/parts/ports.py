"""What a block is: a module that declares what goes in and out, all fp16."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

Shape = tuple[int, ...]

# Additive masks hide with a finite value: -inf turns into NaN on the engine (Apple's own models use -4e4), and
# exp(-1e4) is exactly zero.
MASKED = -1e4


@dataclass(frozen=True)
class Ports:
    """`states` are Core ML states: passed like inputs, but read and written in place, with no output of their own."""

    inputs: Mapping[str, Shape]
    outputs: Mapping[str, Shape]
    states: Mapping[str, Shape] = field(default_factory=dict)


class Block(nn.Module):
    """Called with the inputs and states of `ports` by keyword, returns a dictionary of its outputs.

    `forward` never reads the token count: one trace serves every T.
    """

    def ports(self, tokens: int) -> Ports:
        """Inputs, outputs and states of one call with `tokens` tokens."""
        raise NotImplementedError
