"""Prove a conversion right: its files, every function of every shard, its routing, and the whole
model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ane_moe.checkpoints.adapter import adapter_name
from ane_moe.checkpoints.hub import local_folder
from ane_moe.errors import UserError
from ane_moe.files import temporary_folder
from ane_moe.kept import Kept, kept_beside
from ane_moe.manifest import FILE_NAME, Manifest, read_manifest
from ane_moe.model.spec import InnerScale
from ane_moe.original.ranges import ranges_of
from ane_moe.original.stored_model import Goldens
from ane_moe.origins import shown
from ane_moe.package_form import ASSET
from ane_moe.progress import Progress, phase, silent
from ane_moe.runtime import with_precision
from ane_moe.runtime.coreai.installed import DISTRIBUTIONS
from ane_moe.runtime.reference.engine.ledger import Ledger
from ane_moe.verification.elsewhere import by_workers, shared_goldens
from ane_moe.verification.engine_report import engine_report
from ane_moe.verification.engine_result import EngineReport
from ane_moe.verification.goldens import (
    GoldenSource,
    inner_scales,
    with_switched,
)
from ane_moe.verification.integrity import check_integrity
from ane_moe.verification.proof import Proof, Trial
from ane_moe.verification.proof_key import proof_key
from ane_moe.verification.result import Comparison, TokenizerResult, VerifyReport
from ane_moe.verification.sample import sample_of, sampled_manifest
from ane_moe.verification.tokenizer_parity import compare_tokenizer

# The cosine of a delta below which a function fails: 0.97 is the field's usual gate; fp16 weights
# do far better.
MIN_COSINE = 0.999
MIN_COSINE_COMPRESSED = 0.97
# The whole model adds up the errors of its layers, and single tokens may be routed otherwise at a
# near tie.
MIN_LOGIT_COSINE = 0.99
MIN_LOGIT_COSINE_COMPRESSED = 0.9
DECODE_TOKENS = 32
# Where phases end, as shares of the time that a run with --checkpoint takes.
FILES, GOLDENS = 0.05, 0.5


def verify(
    out: Path,
    *,
    checkpoint: Path | None = None,
    prompts: Path | None = None,
    runtime: str = "auto",
    precision: str = "fp32",
    min_cosine: float | None = None,
    min_logit_cosine: float | None = None,
    decode_tokens: int | None = DECODE_TOKENS,
    quick: bool = False,
    fresh: bool = False,
    adapters: Sequence[Path] = (),
    cluster: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> VerifyReport:
    """Check the conversion in `out` against a golden: the one inside, or one captured from
    `checkpoint` (as of `local_folder`), with what `adapters` add, now. Its tokenizer is compared
    with what the checkpoint's gave then, or gives now.

    `decode_tokens` is about how many tokens go through one-token calls where prefill covers all of
    them (None: all). `quick` looks at a part only (sample.py). What an equal run proved before it
    was broken off is not run again, unless `fresh`. `options` go to the runtime. With precision
    "engine" the results are by the Neural Engine's arithmetic, and the report sets it beside exact
    sums. When files are damaged nothing is run and the report says which. Raises UserError when
    there is no conversion, no golden to compare with, or a golden or prompts of something else.
    A conversion whose adapters can be switched on is checked with that which is named. With a
    `cluster` (as of `open_workers`) its workers, which see `out`, prove the functions.
    """
    told, written = progress or silent, read_manifest(out)
    if checkpoint is not None:
        checkpoint = local_folder(checkpoint, written.walked)
    source = GoldenSource(checkpoint, prompts, tuple(adapters))
    captured = checkpoint is not None
    whole = with_switched(written, adapters, merged=captured)
    manifest = sampled_manifest(whole) if quick else whole
    runtime, computed = with_precision(runtime, precision, manifest.package_form)
    problems = check_integrity(out, written, phase(told, 0, FILES), manifest.shards)
    by_engine = precision == "engine"
    if cluster:
        _require_exact(by_engine)
        out = out.absolute()  # its workers are in folders of their own
    options = options if by_engine else options | computed
    source.require(out, manifest)
    facts = (manifest.routing, manifest.weights, manifest.compressed)
    report = VerifyReport(False, shown(out), runtime, *facts, 0, problems)
    if problems:
        return report
    scope = (decode_tokens, quick, by_engine, [adapter_name(one) for one in adapters])
    key = proof_key(out, source.folders, prompts, runtime, options, scope)
    with kept_beside(out, "proof", key, fresh=fresh) as kept:
        capturing = phase(told, FILES, GOLDENS)
        goldens, prompts_in_all = source.goldens(out, manifest, kept, quick, capturing)
        told("tokenizer", 0, 1)
        tokenizer = compare_tokenizer(out, manifest, checkpoint)
        rest = phase(told, GOLDENS if captured else FILES, 1)
        proof = Proof(out, manifest, runtime, options, decode_tokens, kept, quick, rest)
        trials = _trials(goldens, _gates(manifest, min_cosine, min_logit_cosine))
        engine = None
        if by_engine:
            found, engine = _compared_by_engine(proof, computed, trials)
        elif cluster:
            with _on_cluster(cluster, proof, trials, goldens, captured) as shared:
                found = shared.compared(trials)
        else:
            found = proof.compared(trials)
        prompts_seen = (len(goldens.original.prompts), prompts_in_all)
        sample = sample_of(whole, manifest, prompts_seen, captured) if quick else None
        report = replace(report, sample=sample, engine=engine)
        report = _with_tokenizer(_with_comparisons(report, proof, goldens, found), tokenizer)
    return replace(report, passed=not report.failures)


def _require_exact(by_engine: bool) -> None:
    """Raise UserError where workers would prove by the engine's arithmetic."""
    if by_engine:
        found, do = "--precision engine", "leave one out"
        raise UserError("--cluster proves by exact sums", found, do)


def _with_comparisons(
    report: VerifyReport, proof: Proof, goldens: Goldens, found: Sequence[Comparison]
) -> VerifyReport:
    """The report with what was compared: with the original model and, where there is a golden of
    the weights as stored, with that."""
    against_original, *others = found
    original, manifest = goldens.original, proof.manifest
    inner = inner_scales(manifest)
    ranges = (one.scaled(inner.get(one.layer, InnerScale())) for one in ranges_of(original))
    return replace(
        report,
        **vars(against_original),
        golden_tokens=sum(map(len, original.prompts)),
        model_skipped=proof.why_no_model(original),
        as_stored=others[0] if others else None,
        compression=goldens.compression,
        reused_steps=proof.kept.reused,
        stream_scale=manifest.stream_scale,
        ranges=tuple(ranges),
    )


def _with_tokenizer(report: VerifyReport, found: TokenizerResult | str) -> VerifyReport:
    """The report with what comparing tokens gave, or why there was nothing to compare."""
    if isinstance(found, str):
        return replace(report, tokenizer_skipped=found)
    return replace(report, tokenizer=found)


@contextmanager
def _on_cluster(
    where: str, proof: Proof, trials: Sequence[Trial], goldens: Goldens, captured: bool
) -> Iterator[Proof]:
    """The proof with its functions proved by workers that see the conversion as it is here, or
    fetch what they need of it from the address that it came from."""
    from ane_moe.conversion.admission import Admission
    from ane_moe.conversion.cluster import open_cluster

    manifest = proof.manifest
    packages = DISTRIBUTIONS if manifest.package_form == ASSET else ()
    with (
        open_cluster(where, proof.out) as workers,
        shared_goldens(proof.out, manifest, goldens, captured) as (there, files),
    ):
        seen = [file for file in files.files if isinstance(file, Path)]
        workers.admit(Admission(seen, there, FILE_NAME, packages, writes=False))
        with workers.writers() as pool, by_workers(proof, trials, pool, there, files) as shared:
            yield shared


def _compared_by_engine(
    proof: Proof, computed: dict[str, Any], trials: Sequence[Trial]
) -> tuple[list[Comparison], EngineReport]:
    """The comparisons by the engine's arithmetic, and how they differ from the exact `proof`."""
    ledger = Ledger()
    with temporary_folder() as scratch:
        # What operations met is in the ledger alone, so no step of this is gone on with.
        noted = {**proof.options, **computed, "ledger": ledger}
        predicted = replace(proof, options=noted, kept=Kept(scratch))
        found = predicted.compared(trials)
    (exact,) = proof.compared(trials[:1])
    return found, engine_report(proof.out, proof.manifest, ledger, found[0], exact)


def _gates(
    manifest: Manifest, min_cosine: float | None, min_logit_cosine: float | None
) -> tuple[float, float]:
    """The least cosines of functions and logits against the original: those asked for, or the usual
    ones."""
    usual = MIN_LOGIT_COSINE_COMPRESSED if manifest.compressed else MIN_LOGIT_COSINE
    logits = usual if min_logit_cosine is None else min_logit_cosine
    return function_gate(manifest, min_cosine), logits


def function_gate(manifest: Manifest, min_cosine: float | None) -> float:
    """The cosine that a function has to reach against the original: the one asked for, or the
    usual one."""
    usual = MIN_COSINE_COMPRESSED if manifest.compressed else MIN_COSINE
    return usual if min_cosine is None else min_cosine


def _trials(goldens: Goldens, gates: tuple[float, float]) -> list[Trial]:
    trials = [Trial(goldens.original, *gates)]
    if goldens.as_stored is not None:
        trials.append(Trial(goldens.as_stored, MIN_COSINE, MIN_LOGIT_COSINE))
    return trials
