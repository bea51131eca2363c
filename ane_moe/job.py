"""Job: one conversion, opened once and passed on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ane_moe.checkpoint import Checkpoint, TensorSource, open_checkpoint
from ane_moe.families import describe
from ane_moe.model.weight import WeightName
from ane_moe.plan import ConversionPlan, ConvertOptions, make_plan
from ane_moe.spec import ModelSpec


@dataclass(frozen=True)
class Model:
    """A checkpoint that has been opened and understood: its architecture, and where each of our tensors lies."""

    checkpoint: Checkpoint
    spec: ModelSpec
    sources: Mapping[WeightName, TensorSource]


@dataclass(frozen=True)
class Job(Model):
    """A model on its way into the folder `out`, by a plan. `calibration` is a file, where there is one."""

    plan: ConversionPlan
    out: Path
    calibration: Path | None = None


def open_model(path: Path) -> Model:
    """Open and check a checkpoint folder, without reading weights. Raises UserError."""
    checkpoint = open_checkpoint(path)
    return Model(checkpoint, *describe(checkpoint))


def open_job(path: Path, out: Path, options: ConvertOptions) -> Job:
    """Open a checkpoint folder and plan its conversion. Raises UserError."""
    model = open_model(path)
    return Job(**vars(model), plan=make_plan(model.spec, model.sources, options), out=out)
