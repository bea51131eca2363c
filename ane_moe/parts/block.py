"""What a part of a model is: a module in the engine's form, with the facts of its configuration."""

from torch import Tensor, nn

from ane_moe.model.part import PartConfig
from ane_moe.model.port import Ports

# Additive masks hide with a finite value: -inf turns into NaN on the engine (Apple's own models use
# -4e4), and exp(-1e4) is exactly zero.
MASKED = -1e4


class Block(nn.Module):
    """Called with the inputs and states of its ports by keyword; returns its outputs by name.

    `forward` never reads the token count: one trace serves every T. A block that computes calls of
    different widths in different ways says so (`one_trace`), and is traced for each.
    """

    config: PartConfig
    one_trace = True

    def ports(self, tokens: int) -> Ports:
        return self.config.ports(tokens)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError


def give(module: nn.Module, path: str, value: Tensor) -> None:
    """Put a plain tensor where the parameter at `path` was."""
    parent, _, leaf = path.rpartition(".")
    owner = module.get_submodule(parent)
    owner._parameters.pop(leaf, None)
    owner.__dict__[leaf] = value
