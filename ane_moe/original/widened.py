"""Experts' matrices kept in memory as they are stored, and widened one by one when they are used.

Hugging Face's experts index their two stacks by the experts that were chosen, and nothing else.
bf16 and fp16 become fp32 exactly, so that what is computed is the same to the bit.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

NARROW = (torch.bfloat16, torch.float16)


class Widened:
    """A stack `[E,rows,columns]` in bf16 or fp16; indexed by an expert it gives fp32
    `[rows,columns]`, valid until the next one is asked for."""

    def __init__(self, stack: torch.Tensor):
        self._stack = stack
        self._wide = torch.empty(stack.shape[1:], dtype=torch.float32)

    def __getitem__(self, expert: Any) -> torch.Tensor:
        return self._wide.copy_(self._stack[expert])


def stacks(model: nn.Module) -> dict[str, nn.Module]:
    """The experts' stacks of a model by the name of the parameter, and what owns them."""
    return {
        f"{path}.{name}": module
        for path, module in model.named_modules()
        if type(module).__name__.endswith("Experts")
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    }


@contextmanager
def widened(stacks: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside the block narrow stacks, given by path with what owns them, are widened as they are
    used. The parameters stay where they are: an attribute of the module itself goes before."""
    owned = [(owner, path.rpartition(".")[2]) for path, owner in stacks.items()]
    for owner, name in owned:
        vars(owner)[name] = Widened(owner.get_parameter(name).data)
    try:
        yield
    finally:
        for owner, name in owned:
            del vars(owner)[name]
