"""Experts' matrices kept in memory as they are stored, and widened one by one when they are used.

Hugging Face's experts index their two stacks by the experts that were chosen, and nothing else.
bf16 and fp16 become fp32 exactly, so that what is computed is the same to the bit.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

NARROW = (torch.bfloat16, torch.float16)


class Widened:
    """Experts' matrices in bf16 or fp16, each made of parts that lie one below the other: for each
    part a tensor `[rows,columns]` by expert, or a stack of them. Indexed by an expert it gives fp32
    `[rows of all parts,columns]`, valid until the next one is asked for."""

    def __init__(self, parts: Sequence[Sequence[torch.Tensor] | torch.Tensor]):
        self._parts = parts
        rows = [part[0].shape[0] for part in parts]
        self._wide = torch.empty(sum(rows), parts[0][0].shape[1], dtype=torch.float32)
        self._runs = self._wide.split(rows)

    def __getitem__(self, expert: Any) -> torch.Tensor:
        for run, part in zip(self._runs, self._parts, strict=True):
            run.copy_(part[expert])
        return self._wide


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
def widened(
    stacks: Mapping[str, nn.Module], apart: Mapping[str, Sequence[Sequence[torch.Tensor]]]
) -> Iterator[None]:
    """Inside the block narrow stacks, given by path with what owns them, are widened as they are
    used; those in `apart` are no stacks in memory, but tensors by part and expert. The parameters
    stay where they are: an attribute of the module itself goes before."""
    owned = [(path, owner, path.rpartition(".")[2]) for path, owner in stacks.items()]
    for path, owner, name in owned:
        vars(owner)[name] = Widened(apart.get(path) or [owner.get_parameter(name).data])
    try:
        yield
    finally:
        for _, owner, name in owned:
            del vars(owner)[name]
