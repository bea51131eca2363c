"""Experts that lie stacked, gate, up and down apart: as tensors of their own, each by the name that
transformers has for it."""

from dataclasses import replace

from ane_moe.checkpoints.coded import Part
from ane_moe.checkpoints.stored_tensor import StoredTensor

# Of the families whose experts have other names than gate_proj, up_proj and down_proj.
NUMBERED = {"gate": "w1", "up": "w3", "down": "w2"}
NUMBERED_PARENTS = ("block_sparse_moe", "feed_forward")


def unstacked(tensor: StoredTensor, parent: str, matrix: str) -> dict[str, StoredTensor]:
    """The experts of a stack `(experts, rows, columns)` of gate, up or down below `parent`."""
    numbered = parent.rsplit(".", 1)[-1] in NUMBERED_PARENTS
    end = NUMBERED[matrix] if numbered else f"{matrix}_proj"
    experts, rows, columns = tensor.shape
    size = tensor.size // experts
    apart = {}
    for expert in range(experts):
        own = f"{parent}.experts.{expert}.{end}.weight"
        apart[own] = replace(
            tensor,
            key=own,
            shape=(rows, columns),
            offset=tensor.offset + expert * size * (tensor.codec is None),
            size=size,
            made=True,
            codec=tensor.codec and Part(tensor.codec, expert * rows),
        )
    return apart
