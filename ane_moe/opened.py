"""A checkpoint opened and understood, once for all who read it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

from ane_moe.checkpoints.adapter import Adapter, LowRank, merged, named, open_adapter
from ane_moe.checkpoints.checkpoint import Checkpoint, TensorSource, open_checkpoint
from ane_moe.families import describe
from ane_moe.families.adapters import adapted, added, switchable
from ane_moe.model.spec import InnerScale, ModelSpec
from ane_moe.model.weight import WeightName


@dataclass(frozen=True)
class Model:
    """A checkpoint that has been opened and understood: its architecture, and where each of our
    tensors lies. `adapters` can be switched on, by their names."""

    checkpoint: Checkpoint
    spec: ModelSpec
    sources: Mapping[WeightName, TensorSource]
    adapters: Mapping[str, Adapter] = field(default_factory=dict)

    @property
    def low_ranks(self) -> dict[str, dict[WeightName, LowRank]]:
        """What its adapters add, by their names. Raises UserError for one that is of another model,
        or has more than that."""
        return {
            name: switchable(one, self.spec, self.sources) for name, one in self.adapters.items()
        }


def open_model(
    path: Path,
    ignore: Collection[str] = (),
    adapters: Sequence[str | Path] = (),
    mode: Literal["merge", "switch"] = "merge",
) -> Model:
    """Open and check a checkpoint folder, without reading weights; `ignore` are patterns of tensors
    that may be left over. What the `adapters` add, folders of PEFT's, is added while weights are
    read, or stays apart. Raises UserError."""
    checkpoint = open_checkpoint(path)
    model = Model(checkpoint, *describe(checkpoint, ignore))
    opened = [open_adapter(Path(folder)) for folder in adapters]
    if mode == "switch":
        return replace(model, adapters=named(opened))
    for adapter in opened:
        model = with_adapter(model, adapter)
    return model


M = TypeVar("M", bound=Model)


def with_adapter(model: M, adapter: Adapter) -> M:
    """The model whose checkpoint gives its weights with what an adapter adds. Raises UserError for
    an adapter of another model."""
    low_ranks = adapted(adapter, model.spec, model.sources)
    checkpoint = merged(model.checkpoint, adapter, added(low_ranks, model.sources))
    return replace(model, checkpoint=checkpoint, adapters={})


def with_scales(model: M, stream: float, inner: Mapping[int, InnerScale]) -> M:
    """The same model, its stream times `stream` and layers inside times `inner` (in place of those
    that it had): in the weights of whatever writes and reads them."""
    spec = replace(model.spec.with_stream(stream), inner=inner)
    sources = {
        name: replace(source, scale=spec.multiplier(source.fold, name.layer, name.part))
        for name, source in model.sources.items()
    }
    return replace(model, spec=spec, sources=sources)
