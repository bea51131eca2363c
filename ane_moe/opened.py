"""A checkpoint opened and understood, once for all who read it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from ane_moe.checkpoints.checkpoint import Checkpoint, TensorSource, open_checkpoint
from ane_moe.families import describe
from ane_moe.model.spec import ModelSpec
from ane_moe.model.weight import WeightName


@dataclass(frozen=True)
class Model:
    """A checkpoint that has been opened and understood: its architecture, and where each of our
    tensors lies."""

    checkpoint: Checkpoint
    spec: ModelSpec
    sources: Mapping[WeightName, TensorSource]


def open_model(path: Path, ignore: Collection[str] = ()) -> Model:
    """Open and check a checkpoint folder, without reading weights; `ignore` are patterns of tensors
    that may be left over. Raises UserError."""
    checkpoint = open_checkpoint(path)
    return Model(checkpoint, *describe(checkpoint, ignore))
