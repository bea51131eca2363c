"""A checkpoint opened and understood, once for all who read it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

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


M = TypeVar("M", bound=Model)


def with_stream(model: M, scale: float) -> M:
    """The same model, its stream times `scale` (in place of the one that it had): in the weights of
    whatever writes to it."""
    spec = model.spec.with_stream(scale)
    sources = {
        name: replace(source, scale=spec.multiplier(source.fold))
        for name, source in model.sources.items()
    }
    return replace(model, spec=spec, sources=sources)
