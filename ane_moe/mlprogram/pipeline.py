"""Pipelines: models in a row, each taking what the caller or an earlier stage gives by name."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ane_moe.errors import UserError
from ane_moe.mlprogram.container import open_container
from ane_moe.mlprogram.description import described_feature, read_metadata
from ane_moe.mlprogram.program import Feature
from ane_moe.mlprogram.reader import OpenProgram, pipeline_models, program_of, read_model
from ane_moe.mlprogram.values import ValueReader

PROGRAM = "mlProgram"

# Kinds of stages that are met beside ML Programs, and what can be done.
_REMEDIES = {
    "nonMaximumSuppression": "export the detector without it (Ultralytics: nms=False) and do it "
    "in your own code",
    "neuralNetwork": "convert that stage with convert_to='mlprogram'",
}


@dataclass(frozen=True)
class Stage:
    """One model of a pipeline. `program` is None for what is not an ML Program."""

    index: int
    kind: str
    program: OpenProgram | None


@dataclass(frozen=True)
class OpenPipeline:
    """A pipeline whose stages have been parsed; inputs and outputs are as it describes them."""

    path: Path
    stages: tuple[Stage, ...]
    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]
    specification_version: int
    metadata: dict[str, str]

    def programs(self) -> tuple[OpenProgram, ...]:
        """The stages as ML Programs. Raises UserError where one of them is something else."""
        for stage in self.stages:
            if stage.program is None:
                kinds = ", ".join(other.kind for other in self.stages)
                raise UserError(
                    f"stage {stage.index} of the pipeline is not executed",
                    f"{stage.kind} (the stages are {kinds})",
                    _REMEDIES.get(stage.kind, "only ML Programs are executed"),
                )
        return tuple(stage.program for stage in self.stages if stage.program)


def open_model(path: Path, *, require_weights: bool = True) -> OpenProgram | OpenPipeline:
    """Open an .mlpackage or .mlmodelc: an ML Program, or a pipeline of models.

    Raises UserError for another kind, and for anything that is not sound.
    """
    path = Path(path)
    container = open_container(path)
    model = read_model(container)
    models = pipeline_models(model)
    if not models:
        return program_of(model, path, ValueReader(container, require_weights))
    stages = []
    for index, stage in enumerate(models):
        is_program = stage.WhichOneof("Type") == PROGRAM
        folder = container.stage(index) if container.compiled and is_program else container
        stages.append(_stage(index, stage, path, ValueReader(folder, require_weights)))
    description = model.description
    return OpenPipeline(
        path,
        tuple(stages),
        tuple(map(described_feature, description.input)),
        tuple(map(described_feature, description.output)),
        model.specificationVersion,
        read_metadata(description.metadata),
    )


def _stage(index: int, model: Any, path: Path, values: ValueReader) -> Stage:
    kind = model.WhichOneof("Type") or "unknown"
    return Stage(index, kind, program_of(model, path, values) if kind == PROGRAM else None)
