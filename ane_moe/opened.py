"""A checkpoint opened and understood, once for all who read it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from ane_moe.checkpoints.checkpoint import Checkpoint, TensorSource, open_checkpoint
from ane_moe.families import describe
from ane_moe.model.spec import InnerScale, ModelSpec
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


def with_scales(model: M, stream: float, inner: Mapping[int, InnerScale]) -> M:
    """The same model, its stream times `stream` and layers inside times `inner` (in place of those
    that it had): in the weights of whatever writes and reads them."""
    spec = replace(model.spec.with_stream(stream), inner=inner)
    sources = {
        name: replace(source, scale=spec.multiplier(source.fold, name.layer, name.part))
        for name, source in model.sources.items()
    }
    return replace(model, spec=spec, sources=sources)
