"""No speed for wrong output: the loaded shards against the golden, before anything is timed."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ane_moe.benchmark.result import OutputCheck
from ane_moe.errors import UserError
from ane_moe.loop.labels import Labeller
from ane_moe.loop.session import Session
from ane_moe.manifest import Manifest, length_function
from ane_moe.original.golden import Golden, read_golden
from ane_moe.original.prompts import check_prompts
from ane_moe.progress import Progress
from ane_moe.verification.metrics import relative_l2_limit
from ane_moe.verification.model_metrics import PromptLogits, compare_logits
from ane_moe.verification.parity import decode_tail

# A difference of two logits carries both their errors, and four standard deviations are beyond
# chance.
CLEAR = 4 * math.sqrt(2)
AGAIN = "run `ane-moe convert CHECKPOINT OUT --golden` again: finished shards are reused"
DECODE_TOKENS = 32  # checked through one-token calls where prefill covers every token


ORIGINAL, AS_STORED = "original", "as stored"
# A prompt, the position from which a function ran, and its logits `[N,V]` from there on.
_PromptRun = tuple[int, int, np.ndarray]


def open_goldens(folder: Path, manifest: Manifest) -> dict[str, Golden]:
    """The conversion's goldens: of the original model and, for compressed weights, of the same
    model with the weights as stored. Raises UserError when there is none, or it is not one of the
    whole model."""
    if manifest.golden is None:
        raise UserError(
            f"{folder} holds no golden, and no speed is reported for unchecked output",
            "no golden.safetensors",
            AGAIN,
        )
    goldens = {ORIGINAL: _whole(read_golden(folder / manifest.golden), manifest)}
    if manifest.golden_as_stored:
        goldens[AS_STORED] = _whole(read_golden(folder / manifest.golden_as_stored), manifest)
        if goldens[AS_STORED].prompts != goldens[ORIGINAL].prompts:
            raise UserError(
                "the goldens are not of the same prompts", manifest.golden_as_stored, AGAIN
            )
    check_prompts(
        [list(prompt) for prompt in goldens[ORIGINAL].prompts], manifest.vocab, manifest.context
    )
    return goldens


def _whole(golden: Golden, manifest: Manifest) -> Golden:
    if (
        not golden.complete
        or golden.logits.shape[1] != manifest.scores
        or golden.n_layers != manifest.n_layers
    ):
        raise UserError(
            "the golden is not of this whole model",
            f"{len(golden.layers)} of {golden.n_layers} layers, "
            f"{golden.logits.shape[1]} for {manifest.scores} scores",
            AGAIN,
        )
    return golden


def check_output(
    model: Session | Labeller,
    goldens: Mapping[str, Golden],
    min_logit_cosine: Mapping[str, float],
    progress: Progress,
) -> tuple[OutputCheck, ...]:
    """Teacher-forced through the decode functions and, where there are any, the prefill functions,
    or through an encoder's of each length, each against every golden."""
    original, labels = goldens[ORIGINAL], model.manifest.labels
    runs: dict[str, Iterator[_PromptRun]] = {}
    if isinstance(model, Labeller):
        for length in model.lengths:
            runs[length_function(length)] = _label(model, original, length, progress)
    else:
        for function in ("decode", *(("prefill",) if model.manifest.prefill else ())):
            runs[function] = _run(model, original, function, progress)
    return tuple(
        check
        for function, own in runs.items()
        for check in _check(function, list(own), goldens, min_logit_cosine, labels)
    )


def _check(
    function: str,
    runs: Sequence[_PromptRun],
    goldens: Mapping[str, Golden],
    min_logit_cosine: Mapping[str, float],
    labels: Sequence[str],
) -> Iterator[OutputCheck]:
    if not runs:  # no prompt is as short
        return
    original = goldens[ORIGINAL]
    for name, golden in goldens.items():
        prompts = [
            PromptLogits(
                number,
                cut,
                original.prompts[number][cut:],
                golden.logits[golden.spans[number]][cut:],
                logits,
            )
            for number, cut, logits in runs
        ]
        limit = min_logit_cosine[name]
        wrong = sum(_wrong_tokens(one, limit) for one in prompts)
        compared = compare_logits(function, prompts, limit, labels)
        yield OutputCheck(name, compared, wrong)


def _wrong_tokens(one: PromptLogits, min_logit_cosine: float) -> int:
    """Tokens whose greedy choice differs though the golden's logits `[N,V]` set them clearly
    apart."""
    own, other = one.golden.argmax(1), one.shards.argmax(1)
    rows = np.arange(len(own))
    preferred = one.golden[rows, own] - one.golden[rows, other]
    spread = one.golden.std(1)
    return int((preferred > CLEAR * relative_l2_limit(min_logit_cosine) * spread).sum())


def _run(
    session: Session, golden: Golden, function: str, progress: Progress
) -> Iterator[_PromptRun]:
    tail = decode_tail(session.manifest, golden, DECODE_TOKENS) if function == "decode" else None
    for number, ids in enumerate(golden.prompts):
        progress(f"checking output, {function}", number, len(golden.prompts))
        session.reset()
        cut = 0 if tail is None else max(0, len(ids) - tail)
        if cut:
            session.prefill(ids[:cut])
        yield number, cut, session.prefill_logits(ids[cut:], by=function)


def _label(
    labeller: Labeller, golden: Golden, length: int, progress: Progress
) -> Iterator[_PromptRun]:
    """The prompts that a length holds."""
    for number, ids in enumerate(golden.prompts):
        progress(f"checking output, {length} tokens", number, len(golden.prompts))
        if len(ids) <= length:
            yield number, 0, labeller.logits(ids, length)
