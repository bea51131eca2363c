"""A pipeline of ML Programs in the reference runtime: its stages one after the other."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from ane_moe.errors import UserError
from ane_moe.mlprogram.pipeline import OpenPipeline
from ane_moe.mlprogram.program import Feature
from ane_moe.runtime.inputs import check_inputs
from ane_moe.runtime.interface import Intermediate, Observer


class Stage(Protocol):
    """What a pipeline needs of a function of the reference runtime."""

    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]
    states: tuple[Feature, ...]

    def predict(self, inputs: Mapping[str, np.ndarray]) -> dict[str, Any]: ...

    def intermediates(self) -> tuple[Intermediate, ...]: ...

    def observe(self, inputs: Mapping[str, np.ndarray], observer: Observer) -> dict[str, Any]: ...

    def load_weights(self) -> None: ...

    def drop_weights(self) -> None: ...


class ReferencePipeline:
    """The stages of a pipeline as one function, named `main`. It has no states.

    Raises UserError for stages with states, and where one takes or the pipeline gives what nothing
    before it provides.
    """

    in_part = False

    def __init__(self, pipeline: OpenPipeline, stages: Sequence[Stage]):
        self.name = "main"
        self.states: tuple[Feature, ...] = ()
        self._stages = stages
        for index, stage in enumerate(stages):
            if stage.states:
                raise UserError(
                    f"stage {index} of the pipeline has states",
                    ", ".join(feature.name for feature in stage.states),
                    "run its stages as packages of their own",
                )
        given = {feature.name for feature in pipeline.inputs}
        taken, made = _features(stages, given)
        self.inputs = tuple(_named(taken, feature.name, "takes") for feature in pipeline.inputs)
        self.outputs = tuple(_named(made, feature.name, "gives") for feature in pipeline.outputs)

    def make_state(self) -> None:
        """None: a pipeline has no states."""

    def predict(
        self, inputs: Mapping[str, np.ndarray], state: None = None
    ) -> dict[str, np.ndarray]:
        """Run each stage once on the inputs and what the stages before it gave, matched by name.

        Raises UserError for inputs that do not fit, as a single function does.
        """
        return self._run(inputs, None)

    def intermediates(self) -> tuple[Intermediate, ...]:
        """Those of all stages, in order; names are `stage/name`."""
        return tuple(
            replace(one, name=f"{index}/{one.name}")
            for index, stage in enumerate(self._stages)
            for one in stage.intermediates()
        )

    def observe(
        self, inputs: Mapping[str, np.ndarray], observer: Observer, state: None = None
    ) -> dict[str, np.ndarray]:
        """As `predict`, showing `observer` what each op gives; names are `stage/name`."""
        return self._run(inputs, observer)

    def load_weights(self) -> None:
        """Read and expand the weights of all stages now."""
        for stage in self._stages:
            stage.load_weights()

    def drop_weights(self) -> None:
        """Free the expanded weights; the next call reads them again."""
        for stage in self._stages:
            stage.drop_weights()

    def _run(
        self, inputs: Mapping[str, np.ndarray], observer: Observer | None
    ) -> dict[str, np.ndarray]:
        check_inputs(self.inputs, inputs, "the pipeline")
        values = dict(inputs)
        for index, stage in enumerate(self._stages):
            names = [feature.name for feature in stage.inputs if feature.name in values]
            given = {name: values[name] for name in names}
            if observer is None:
                values |= stage.predict(given)
            else:
                values |= stage.observe(given, _prefixed(observer, f"{index}/"))
        return {feature.name: values[feature.name] for feature in self.outputs}


def _prefixed(observer: Observer, prefix: str) -> Observer:
    return lambda op, name, outputs: observer(
        op, prefix + name, {prefix + key: value for key, value in outputs.items()}
    )


def _features(
    stages: Sequence[Stage],
    given: set[str],
) -> tuple[dict[str, Feature], dict[str, Feature]]:
    """What the stages take from outside, and what they give, by name.

    Raises UserError for a stage whose input is neither in `given` nor an output of an earlier one.
    """
    taken: dict[str, Feature] = {}
    made: dict[str, Feature] = {}
    for index, stage in enumerate(stages):
        for feature in stage.inputs:
            if feature.name not in made and feature.name not in given:
                raise UserError(
                    f"stage {index} of the pipeline takes what nothing gives it",
                    feature.name,
                    "the package is damaged",
                )
            if feature.name not in made:
                taken.setdefault(feature.name, feature)
        made |= {feature.name: feature for feature in stage.outputs}
    return taken, made


def _named(features: Mapping[str, Feature], name: str, verb: str) -> Feature:
    if name not in features:
        raise UserError(f"the pipeline {verb} what no stage {verb}", name, "the package is damaged")
    return features[name]
