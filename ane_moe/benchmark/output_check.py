"""No speed for wrong output: the loaded shards against the golden, before anything is timed."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ane_moe.benchmark.result import OutputCheck
from ane_moe.errors import UserError
from ane_moe.manifest import Manifest
from ane_moe.runtime.session import Session
from ane_moe.verification.golden import Golden, Progress, read_golden
from ane_moe.verification.metrics import relative_l2_limit
from ane_moe.verification.model_metrics import PromptLogits, compare_logits
from ane_moe.verification.parity import decode_tail
from ane_moe.verification.prompts import check_prompts

# A difference of two logits carries both their errors, and four standard deviations are beyond chance.
CLEAR = 4 * math.sqrt(2)
DECODE_TOKENS = 32      # checked through one-token calls where prefill covers every token


def open_golden(folder: Path, manifest: Manifest) -> Golden:
    """The conversion's golden. Raises UserError when there is none, or it is not one of the whole model."""
    do = "run `ane-moe convert CHECKPOINT OUT --golden` again: finished shards are reused"
    if manifest.golden is None:
        raise UserError(f"{folder} holds no golden, and no speed is reported for unchecked output",
                        "no golden.safetensors", do)
    golden = read_golden(folder / manifest.golden)
    if not golden.complete or golden.logits.shape[1] != manifest.vocab or golden.n_layers != manifest.n_layers:
        raise UserError("the golden is not of this whole model", f"{len(golden.layers)} of {golden.n_layers} layers, "
                        f"{golden.logits.shape[1]} for {manifest.vocab} vocabulary entries", do)
    check_prompts([list(prompt) for prompt in golden.prompts], manifest.vocab, manifest.context)
    return golden


def check_output(session: Session, golden: Golden, min_logit_cosine: float,
                 progress: Progress) -> tuple[OutputCheck, ...]:
    """Teacher-forced through the decode functions and, where there are any, the prefill functions."""
    functions = ("decode", *(("prefill",) if session.manifest.prefill else ()))
    return tuple(_check(name, list(_logits(session, golden, name, progress)), min_logit_cosine) for name in functions)


def _check(function: str, prompts: list[PromptLogits], min_logit_cosine: float) -> OutputCheck:
    wrong = sum(_wrong_tokens(one, min_logit_cosine) for one in prompts)
    return OutputCheck(compare_logits(function, prompts, min_logit_cosine), wrong)


def _wrong_tokens(one: PromptLogits, min_logit_cosine: float) -> int:
    """Tokens whose greedy choice differs though the golden's logits `[N,V]` set them clearly apart."""
    own, other = one.golden.argmax(1), one.shards.argmax(1)
    rows = np.arange(len(own))
    preferred = one.golden[rows, own] - one.golden[rows, other]
    spread = one.golden.std(1)
    return int((preferred > CLEAR * relative_l2_limit(min_logit_cosine) * spread).sum())


def _logits(session: Session, golden: Golden, function: str, progress: Progress) -> Iterator[PromptLogits]:
    tail = decode_tail(session.manifest, golden, DECODE_TOKENS) if function == "decode" else None
    for number, (ids, span) in enumerate(zip(golden.prompts, golden.spans, strict=True)):
        progress(f"checking output, {function}", number, len(golden.prompts))
        session.reset()
        cut = 0 if tail is None else max(0, len(ids) - tail)
        if cut:
            session.prefill(ids[:cut])
        yield PromptLogits(number, cut, ids[cut:], golden.logits[span][cut:],
                           session.prefill_logits(ids[cut:], by=function))
