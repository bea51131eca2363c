"""What guesses of experts know of a trace beside its choices: the hidden states of the conversion
that it is of.

N = tokens, d = d_model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from ane_moe.early_adapters import read_adapters
from ane_moe.errors import UserError
from ane_moe.loop.prefetch import Guessing, Predictor, make_predictor
from ane_moe.loop.shards import load_shards
from ane_moe.progress import Progress, silent
from ane_moe.routing.residuals import Residuals, record_residuals
from ane_moe.routing.routing_trace import RoutingTrace

HiddenStates = Mapping[int, np.ndarray]  # by layer, fp16 `[N,d]`: what its experts add to
SAME = 0.5  # of a trace's choices, which may be of the original in fp32; of chance it is k / E


@dataclass(frozen=True)
class Heard:
    """`predictors`, by name, take hidden states as they are when a layer calls its experts."""

    entering: HiddenStates
    predictors: Mapping[str, Predictor]


def hear(
    trace: RoutingTrace,
    folder: Path,
    adapters: Path | None = None,
    *,
    runtime: str = "auto",
    progress: Progress = silent,
) -> Heard:
    """Run the trace's tokens through the conversion in `folder`. Predictors are the layers' own
    routers, and these on what `adapters`, a file of `ane-moe align`, make of hidden states.

    Raises UserError where the trace is not of this conversion, and as `record_residuals`,
    `read_adapters` and `make_predictor` do.
    """
    free = psutil.virtual_memory().available // 4
    shards = load_shards(folder, runtime, expert_cache_bytes=free)
    manifest, tokens = shards.manifest, trace.tokens
    ways = {"router": Guessing("router")}
    if adapters:
        given = read_adapters(adapters, manifest.d_model)
        ways["adapter"] = Guessing("adapter", adapters=given)
    made = {name: make_predictor(way, folder, manifest) for name, way in ways.items()}
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < manifest.vocab:
        raise _of_another(folder, f"tokens up to {tokens.max()}")
    passages = [tokens[one].tolist() for one in trace.passages]
    residuals = record_residuals(shards, passages, progress)
    _require_same(trace, residuals, folder)
    return Heard(residuals.entering, {name: one for name, one in made.items() if one})


def _require_same(trace: RoutingTrace, residuals: Residuals, folder: Path) -> None:
    if residuals.chosen.keys() != trace.layers.keys():
        raise _of_another(folder, f"layers {list(residuals.chosen)}, not {list(trace.layers)}")
    for layer, one in trace.layers.items():
        chosen, traced = residuals.chosen[layer], one.mask()
        same = chosen.shape[1] >= one.experts and traced & chosen[:, : one.experts]
        if np.sum(same) < SAME * traced.sum():
            raise _of_another(folder, f"other experts are chosen in layer {layer}")


def _of_another(folder: Path, found: str) -> UserError:
    return UserError(f"the trace is not of {folder}", found, "make one with `ane-moe trace`")
