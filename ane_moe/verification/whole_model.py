"""The whole model end to end against the golden's logits, one stage of shards after the other.

The tokens of a golden are known. So each stage is opened once, all tokens of all prompts go through
it call by call as the token loop would call it, and the streams go on to the next: the logits are
the token loop's, to the bit, and no more than one stage is held.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ane_moe.loop.buffers import Ropes
from ane_moe.loop.experts import ExpertDispatch
from ane_moe.loop.shards import Step
from ane_moe.manifest import Manifest, length_function
from ane_moe.model.port import LOGITS, STREAM, slot_root, slot_rows
from ane_moe.original.golden import Golden
from ane_moe.verification.model_metrics import PromptLogits, compare_logits
from ane_moe.verification.result import FunctionModelResult
from ane_moe.verification.stage import StageRun, Values

CARRIED = ("stream", "added", "carry")  # slots that go from stage to stage


@dataclass
class _Prompt:
    """The prompt `number` of a golden on its way: from row `cut` on it goes through the function of
    the pass, before it through prefill. `values` also has what shards keep that others read, as it
    stands."""

    number: int
    ids: tuple[int, ...]
    cut: int
    values: dict[str, np.ndarray]  # [N,C] by slot
    logits: np.ndarray  # [N - cut, V]


@dataclass
class ModelPass:
    """One pass of `function` over the prompts, teacher-forced."""

    function: str
    prompts: list[_Prompt] = field(default_factory=list)
    labels: tuple[str, ...] = ()
    lent: tuple[str, ...] = ()  # slots of what is kept, and read by other shards

    def advance(self, steps: Sequence[Step], ropes: Ropes, dispatch: ExpertDispatch | None) -> None:
        """Take every prompt through the next stage."""
        run = StageRun(steps, ropes, dispatch)
        if run.gives_scores and run.by_token:  # a head: calls are as full as they can be
            return self._score(run, self.prompts)
        for prompt in self.prompts:
            run.start({slot: prompt.values[slot] for slot in self.lent if slot in prompt.values})
            if run.gives_scores:
                self._score(run, [prompt])
            else:
                self._move(run, prompt)

    def _move(self, run: StageRun, prompt: _Prompt) -> None:
        pieces: list[Values] = []
        if prompt.cut:
            head = {slot: prompt.values[slot][: prompt.cut] for slot in run.reads}
            pieces.append(run.whole("prefill", head).values)
        tail = {slot: prompt.values[slot][prompt.cut :] for slot in run.reads}
        pieces.append(run.whole(self.function, tail).values)
        written = (slot for slot in pieces[0] if slot_root(slot) in CARRIED)
        prompt.values |= {
            slot: np.concatenate([piece[slot] for piece in pieces]) for slot in written
        } | run.kept(self.lent)

    def _score(self, run: StageRun, prompts: Sequence[_Prompt]) -> None:
        tails = [{slot: one.values[slot][one.cut :] for slot in run.reads} for one in prompts]
        given = {slot: np.concatenate([tail[slot] for tail in tails]) for slot in run.reads}
        ends = np.cumsum([len(one.logits) for one in prompts])[:-1]
        for slot, scores in run.run(self.function, given).values.items():
            if slot_root(slot) == LOGITS:
                for one, own in zip(prompts, np.split(scores, ends), strict=True):
                    one.logits[:, slice(*slot_rows(slot))] = own

    def state(self) -> list[dict[str, torch.Tensor]]:
        """What goes on to the next stage, by prompt."""
        return [
            {slot: torch.from_numpy(value) for slot, value in prompt.values.items()}
            for prompt in self.prompts
        ]

    def resume(self, state: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Go on from where `state` was taken."""
        for prompt, values in zip(self.prompts, state, strict=True):
            prompt.values = {slot: value.numpy() for slot, value in values.items()}

    def result(self, golden: Golden, min_logit_cosine: float) -> FunctionModelResult:
        """The logits against a golden's, once every stage has been passed."""
        return compare_logits(self.function, self._logits(golden), min_logit_cosine, self.labels)

    def _logits(self, golden: Golden) -> Iterator[PromptLogits]:
        for prompt in self.prompts:
            cut, span = prompt.cut, golden.spans[prompt.number]
            yield PromptLogits(
                prompt.number, cut, prompt.ids[cut:], golden.logits[span][cut:], prompt.logits
            )


def model_passes(
    manifest: Manifest,
    prompts: Sequence[tuple[int, ...]],
    streams: Sequence[np.ndarray],
    tail: int | None,
) -> list[ModelPass]:
    """Decode over the last `tail` tokens of each prompt (None: all), after prefill; and prefill
    over all of them, where there is any. For an encoder, each length over the prompts that it
    holds. `streams` are the embeddings of each prompt, fp16 `(N, d)`."""
    if manifest.lengths:
        fitting = {
            length: [number for number, ids in enumerate(prompts) if len(ids) <= length]
            for length in manifest.lengths
        }
        return [
            ModelPass(
                length_function(length),
                [_prompt(manifest, number, prompts[number], 0, streams) for number in numbers],
                labels=manifest.labels,
            )
            for length, numbers in fitting.items()
            if numbers
        ]
    cuts = {"decode": [0 if tail is None else max(0, len(ids) - tail) for ids in prompts]}
    if manifest.prefill:
        cuts["prefill"] = [0] * len(prompts)
    return [
        ModelPass(
            function,
            [
                _prompt(manifest, number, ids, cut, streams)
                for number, (ids, cut) in enumerate(zip(prompts, own, strict=True))
            ],
            lent=tuple(manifest.lent),
        )
        for function, own in cuts.items()
    ]


def _prompt(
    manifest: Manifest,
    number: int,
    ids: tuple[int, ...],
    cut: int,
    streams: Sequence[np.ndarray],
) -> _Prompt:
    logits = np.empty((len(ids) - cut, manifest.scores), np.float32)
    return _Prompt(number, ids, cut, {STREAM: streams[number]}, logits)
