"""The whole model end to end: the token loop over all shards, against the golden's logits."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from ane_moe.loop.session import Session
from ane_moe.loop.shards import LoadedShard, LoadedShards, load_shards
from ane_moe.manifest import Manifest
from ane_moe.mlprogram.program import Feature
from ane_moe.original.golden import Golden
from ane_moe.progress import Progress
from ane_moe.runtime.interface import LoadedFunction
from ane_moe.verification.model_metrics import PromptLogits, compare_logits
from ane_moe.verification.parity import decode_tail
from ane_moe.verification.result import FunctionModelResult

EXPANDED_BYTES = 4      # of a weight: the reference runtime expands to fp32

# (function, prompts, first position of each) -> logits of each prompt
Passes = dict[tuple[str, tuple[tuple[int, ...], ...], tuple[int, ...]], list[np.ndarray]]


@dataclass(frozen=True)
class WholeModel:
    """Runs the conversion in `folder` on the golden's prompts, teacher-forced.

    Where prefill covers every token, decode calls see about `decode_tokens` of them (None: all): the end of each
    prompt, after its beginning went through prefill. Each pass loads the shards anew; where their expanded weights
    would not fit into memory, every shard reads its own again for each call.
    `passes` keeps the logits of each pass for another golden on the same prompts (None: does not).
    """

    folder: Path
    manifest: Manifest
    golden: Golden
    runtime: str
    options: dict[str, Any]
    min_logit_cosine: float
    decode_tokens: int | None
    progress: Progress
    passes: Passes | None = None

    def results(self) -> Iterator[FunctionModelResult]:
        tail = decode_tail(self.manifest, self.golden, self.decode_tokens)
        yield compare_logits("decode", self._logits("decode", tail), self.min_logit_cosine)
        if self.manifest.prefill:
            yield compare_logits("prefill", self._logits("prefill", None), self.min_logit_cosine)

    def _logits(self, function: str, tail: int | None) -> Iterator[PromptLogits]:
        prompts = self.golden.prompts
        cuts = [0 if tail is None else max(0, len(ids) - tail) for ids in prompts]
        shards: Iterable[np.ndarray] = self._run(function, cuts)
        if self.passes is not None:
            key = (function, prompts, tuple(cuts))
            if key not in self.passes:
                self.passes[key] = list(shards)
            shards = self.passes[key]
        pairs = zip(prompts, self.golden.spans, cuts, shards, strict=True)
        for number, (ids, span, cut, logits) in enumerate(pairs):
            yield PromptLogits(number, cut, ids[cut:], self.golden.logits[span][cut:], logits)

    def _run(self, function: str, cuts: Sequence[int]) -> Iterator[np.ndarray]:
        """The shards' logits `[N,V]` for each prompt from its cut on."""
        shards = load_shards(self.folder, self.runtime, expert_cache_bytes=psutil.virtual_memory().available // 4,
                             **self.options)
        session = Session(shards if self._fits() else _forgetful(shards))
        for number, (ids, cut) in enumerate(zip(self.golden.prompts, cuts, strict=True)):
            self.progress(f"whole model, {function}", number, len(self.golden.prompts))
            session.reset()
            if cut:
                session.prefill(ids[:cut])
            yield session.prefill_logits(ids[cut:], by=function)

    def _fits(self) -> bool:
        resident = [shard for shard in self.manifest.shards if not shard.dispatched]
        expanded = EXPANDED_BYTES * sum(shard.functions[0].elements for shard in resident)
        return self.runtime != "reference" or expanded < psutil.virtual_memory().available / 2


class _Forgetful:
    """A function of the reference runtime that frees its expanded weights after every call."""

    def __init__(self, function: Any):
        self._function = function
        self.inputs: tuple[Feature, ...] = function.inputs
        self.outputs: tuple[Feature, ...] = function.outputs
        self.states: tuple[Feature, ...] = function.states

    def make_state(self) -> Any:
        return self._function.make_state()

    def predict(self, inputs: dict[str, np.ndarray], state: Any = None) -> dict[str, np.ndarray]:
        outputs: dict[str, np.ndarray] = self._function.predict(inputs, state)
        self._function.drop_weights()
        return outputs


def _forgetful(shards: LoadedShards) -> LoadedShards:
    def wrapped(loaded: LoadedShard) -> LoadedShard:
        functions: dict[str, LoadedFunction] = {name: _Forgetful(one) for name, one in loaded.functions.items()}
        return replace(loaded, functions=functions)

    steps = (wrapped(step) if isinstance(step, LoadedShard) else step for step in shards.steps)
    return replace(shards, steps=tuple(steps))
