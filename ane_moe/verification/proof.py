"""Every function, the routing and the whole model against goldens, stage by stage.

What a stage gave is kept when it is done, together with the streams that the whole model goes on
with; a run that was broken off goes on there.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from ane_moe.kept import Kept
from ane_moe.loop.buffers import Ropes, rope_tables
from ane_moe.loop.embedding_table import open_embeddings
from ane_moe.loop.experts import ExpertDispatch, expert_layers, open_cache
from ane_moe.loop.shards import LoadedShard, check_shard
from ane_moe.manifest import Manifest, Shard
from ane_moe.original.golden import Golden, embedded
from ane_moe.progress import Progress
from ane_moe.runtime import open_package
from ane_moe.verification.expert_parity import ExpertParity
from ane_moe.verification.gate import gated
from ane_moe.verification.parity import Parity, decode_tail
from ane_moe.verification.result import Comparison, RoutingResult, ShardResult
from ane_moe.verification.stage import Stage, alone, stages
from ane_moe.verification.whole_model import ModelPass, model_passes

Row = ShardResult | RoutingResult
ROWS: dict[str, type[ShardResult] | type[RoutingResult]] = {
    kind.__name__: kind for kind in (ShardResult, RoutingResult)
}


@dataclass(frozen=True)
class Trial:
    """A golden, and the cosines that functions and the whole model have to reach against it."""

    golden: Golden
    min_cosine: float
    min_logit_cosine: float


@dataclass(frozen=True)
class Proof:
    """Opens the shards of a conversion, stage by stage, once for everything that is compared."""

    out: Path
    manifest: Manifest
    runtime: str
    options: dict[str, Any]
    decode_tokens: int | None
    kept: Kept
    quick: bool  # functions of a few experts, and not the whole model
    progress: Progress
    # The rows of stages that are proved elsewhere, by their numbers, once those are asked.
    begun: Mapping[int, "Future[Future[list[list[Row]]]]"] = field(default_factory=dict)

    def compared(self, trials: Sequence[Trial]) -> list[Comparison]:
        """Every function and the whole model against each golden; they are of the same prompts."""
        golden, ropes = trials[0].golden, rope_tables(self.manifest)
        dispatch = self._dispatch(self.manifest)
        parities = [self._parity(trial, ropes, dispatch) for trial in trials]
        passes = [] if self.why_no_model(golden) else self._passes(golden)
        rows: list[list[Row]] = [
            [*parity.embed()] if 0 in self.manifest.layers else [] for parity in parities
        ]
        listed = stages(self.manifest)
        sizes = [self._bytes(stage) for stage in listed]
        for number, stage in enumerate(listed):
            self.progress(_label(stage), sum(sizes[:number]), sum(sizes))
            found = self._kept_stage(number, trials, passes)
            if found is None:
                elsewhere = self.begun.get(number)
                here = [] if elsewhere else parities
                found = self._stage(stage, here, passes, ropes, dispatch)
                found = elsewhere.result().result() if elsewhere else found
                if not _gives_scores(stage):
                    self._keep_stage(number, found, passes)
            for own, more in zip(rows, found, strict=True):
                own += more
        return [_comparison(trial, own, passes) for trial, own in zip(trials, rows, strict=True)]

    def rows(self, stage: Stage, trials: Sequence[Trial]) -> list[list[Row]]:
        """The rows of one stage against each golden, and nothing of the whole model."""
        ropes, dispatch = rope_tables(self.manifest), self._dispatch(of_stage(self.manifest, stage))
        parities = [self._parity(trial, ropes, dispatch) for trial in trials]
        return self._stage(stage, parities, (), ropes, dispatch)

    def is_kept(self, number: int) -> bool:
        """Whether a stage was done before."""
        return self.kept.has(_step(number))

    def _stage(
        self,
        stage: Stage,
        parities: Sequence[Parity],
        passes: Sequence[ModelPass],
        ropes: Ropes,
        dispatch: ExpertDispatch | None,
    ) -> list[list[Row]]:
        """The rows of a stage against each golden; the passes are taken through it."""
        experts = dispatch.layers if dispatch else {}
        steps = [self._open(step) if isinstance(step, Shard) else experts[step] for step in stage]
        rows = [[row for own in alone(steps) for row in parity.rows(own)] for parity in parities]
        for model_pass in passes:
            model_pass.advance(steps, ropes, dispatch)
        return rows

    def _keep_stage(
        self, number: int, rows: Sequence[Sequence[Row]], passes: Sequence[ModelPass]
    ) -> None:
        named = [[(type(row).__name__, vars(row)) for row in own] for own in rows]
        self.kept.save(_step(number), {"rows": named, "passes": [one.state() for one in passes]})

    def _kept_stage(
        self, number: int, trials: Sequence[Trial], passes: Sequence[ModelPass]
    ) -> list[list[Row]] | None:
        """The rows of a stage that was done before, by the gates of today; the passes go on from
        its end."""
        found = self.kept.load(_step(number))
        if found is None:
            return None
        for model_pass, state in zip(passes, found["passes"], strict=True):
            model_pass.resume(state)
        return [
            [_row(kind, values, trial.min_cosine) for kind, values in own]
            for trial, own in zip(trials, found["rows"], strict=True)
        ]

    def _bytes(self, stage: Stage) -> int:
        """How much there is to do: the weights of a stage."""
        shards = [step for step in stage if isinstance(step, Shard)]
        shards += [s for s in self.manifest.shards if s.dispatched and s.layer in stage]
        return sum(shard.weight_bytes for shard in shards)

    def why_no_model(self, golden: Golden) -> str | None:
        """Why the whole model is not run, if so."""
        manifest = self.manifest
        if self.quick:
            return "a quick look is at parts of it"
        if manifest.layers != tuple(range(manifest.n_layers)):
            return f"only {len(manifest.layers)} of {manifest.n_layers} layers were converted"
        if not golden.complete:
            return "the golden does not cover every layer"
        return None

    def _parity(self, trial: Trial, ropes: Ropes, dispatch: ExpertDispatch | None) -> Parity:
        experts = None
        if dispatch:
            experts = ExpertParity(trial.golden, dispatch, trial.min_cosine, self.quick)
        return Parity(
            self.out,
            self.manifest,
            trial.golden,
            trial.min_cosine,
            self.decode_tokens,
            ropes,
            self._open,
            experts,
        )

    def _passes(self, golden: Golden) -> list[ModelPass]:
        tail = decode_tail(self.manifest, golden, self.decode_tokens)
        table = open_embeddings(self.out, self.manifest)
        if self.manifest.embed is None:
            given = embedded(golden).astype(np.float16)
            streams = [given[span] for span in golden.spans]
        else:
            streams = [table[np.asarray(ids)] for ids in golden.prompts]
        return model_passes(self.manifest, golden.prompts, streams, tail)

    def _dispatch(self, manifest: Manifest) -> ExpertDispatch | None:
        """What runs the expert functions, where there are any, in a share of the memory that is
        free."""
        layers, room = expert_layers(manifest), psutil.virtual_memory().available // 4
        if not layers:
            return None
        return ExpertDispatch(
            layers, open_cache(self.out, manifest, self.runtime, room, **self.options)
        )

    def _open(self, shard: Shard) -> LoadedShard:
        package = open_package(self.out / shard.path, self.runtime, **self.options)
        loaded = LoadedShard(
            shard, {entry.name: package.function(entry.entry) for entry in shard.functions}
        )
        check_shard(loaded, self.out)
        return loaded


def of_stage(manifest: Manifest, stage: Stage) -> Manifest:
    """The conversion without dispatched experts of the layers that only other stages have."""
    layers = (None, *stage)  # of a graph that computes experts of many layers: none
    kept = (shard for shard in manifest.shards if not shard.dispatched or shard.layer in layers)
    return replace(manifest, shards=tuple(kept))


def _comparison(trial: Trial, rows: Sequence[Row], passes: Sequence[ModelPass]) -> Comparison:
    return Comparison(
        tuple(row for row in rows if isinstance(row, ShardResult)),
        tuple(row for row in rows if isinstance(row, RoutingResult)),
        tuple(one.result(trial.golden, trial.min_logit_cosine) for one in passes),
    )


def _step(number: int) -> str:
    return f"stage_{number:04d}"


def _row(kind: str, values: dict[str, Any], min_cosine: float) -> Row:
    row = ROWS[kind](**values)
    return gated(row, min_cosine) if isinstance(row, ShardResult) else row


def _gives_scores(stage: Stage) -> bool:
    """Whether it is of the head: quickly done again, and its logits are large."""
    return isinstance(stage[0], Shard) and stage[0].rows is not None


def _label(stage: Stage) -> str:
    shard = stage[0]
    if isinstance(shard, int):
        return f"layer {shard}: experts"
    return shard.kind if shard.layer is None else f"layer {shard.layer}: {shard.kind}"
