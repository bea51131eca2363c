"""A checkpoint opened and understood, once for all who read it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from ane_moe.checkpoints.adapter import Adapter, merged, open_adapter
from ane_moe.checkpoints.checkpoint import Checkpoint, TensorSource, open_checkpoint
from ane_moe.families import describe
from ane_moe.families.adapters import adapted, added
from ane_moe.model.spec import InnerScale, ModelSpec
from ane_moe.model.weight import WeightName


@dataclass(frozen=True)
class Model:
    """A checkpoint that has been opened and understood: its architecture, and where each of our
    tensors lies."""

    checkpoint: Checkpoint
    spec: ModelSpec
    sources: Mapping[WeightName, TensorSource]


def open_model(
    path: Path, ignore: Collection[str] = (), adapters: Sequence[str | Path] = ()
) -> Model:
    """Open and check a checkpoint folder, without reading weights; `ignore` are patterns of tensors
    that may be left over, and what the `adapters` add, folders of PEFT's, is added while weights
    are read. Raises UserError."""
    checkpoint = open_checkpoint(path)
    model = Model(checkpoint, *describe(checkpoint, ignore))
    for folder in adapters:
        model = with_adapter(model, open_adapter(Path(folder)))
    return model


M = TypeVar("M", bound=Model)


def with_adapter(model: M, adapter: Adapter) -> M:
    """The model whose checkpoint gives its weights with what an adapter adds. Raises UserError for
    an adapter of another model."""
    low_ranks = adapted(adapter, model.spec, model.sources)
    return replace(
        model, checkpoint=merged(model.checkpoint, adapter, added(low_ranks, model.sources))
    )


def with_scales(model: M, stream: float, inner: Mapping[int, InnerScale]) -> M:
    """The same model, its stream times `stream` and layers inside times `inner` (in place of those
    that it had): in the weights of whatever writes and reads them."""
    spec = replace(model.spec.with_stream(stream), inner=inner)
    sources = {
        name: replace(source, scale=spec.multiplier(source.fold, name.layer, name.part))
        for name, source in model.sources.items()
    }
    return replace(model, spec=spec, sources=sources)
