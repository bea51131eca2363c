"""Prove a conversion right: its files, every function of every shard, its routing, and the whole
model."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import psutil

from ane_moe.errors import UserError
from ane_moe.loop.buffers import Ropes, rope_tables
from ane_moe.loop.embedding_table import open_embeddings
from ane_moe.loop.experts import ExpertDispatch, expert_layers, open_cache
from ane_moe.loop.shards import LoadedShard, check_shard
from ane_moe.manifest import Manifest, Shard, read_manifest
from ane_moe.opened import open_model
from ane_moe.original.capture import capture_golden
from ane_moe.original.golden import Golden, read_golden
from ane_moe.original.prompts import check_prompts, read_prompts
from ane_moe.original.stored_model import capture_as_stored, with_errors
from ane_moe.progress import Progress, silent
from ane_moe.runtime import open_package, with_precision
from ane_moe.runtime.reference.engine.ledger import Ledger
from ane_moe.verification.engine_report import engine_report
from ane_moe.verification.expert_parity import ExpertParity
from ane_moe.verification.integrity import check_integrity
from ane_moe.verification.parity import Parity, decode_tail
from ane_moe.verification.result import Comparison, RoutingResult, ShardResult, VerifyReport
from ane_moe.verification.stage import stages
from ane_moe.verification.tokenizer_parity import compare_tokenizer
from ane_moe.verification.whole_model import ModelPass, model_passes

# The cosine of a delta below which a function fails: 0.97 is the field's usual gate; fp16 weights
# do far better.
MIN_COSINE = 0.999
MIN_COSINE_COMPRESSED = 0.97
# The whole model adds up the errors of its layers, and single tokens may be routed otherwise at a
# near tie.
MIN_LOGIT_COSINE = 0.99
MIN_LOGIT_COSINE_COMPRESSED = 0.9
DECODE_TOKENS = 32


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
    progress: Progress | None = None,
    **options: Any,
) -> VerifyReport:
    """Check the conversion in `out` against a golden: the one inside, or one captured from
    `checkpoint` now. Its tokenizer is compared with what the checkpoint's gave then, or gives now.

    `decode_tokens` is about how many tokens go through one-token calls where prefill covers all of
    them (None: all). `options` go to the runtime. With precision "engine" the results are by the
    Neural Engine's arithmetic, and the report sets it beside exact sums. When files are damaged
    nothing is run and the report says which. Raises UserError when there is no conversion, no
    golden to compare with, or a golden or prompts of something else.
    """
    report_progress = progress or silent
    manifest = read_manifest(out)
    runtime, computed = with_precision(runtime, precision)
    problems = check_integrity(out, manifest, report_progress)
    with tempfile.TemporaryDirectory(prefix="ane-moe-") as scratch:
        goldens = _goldens(
            out, manifest, checkpoint, prompts, Path(scratch), report_progress, bool(problems)
        )
        tokens = sum(map(len, goldens.original.prompts)) if goldens else 0
        report = VerifyReport(
            False,
            str(out),
            runtime,
            manifest.routing,
            manifest.weights,
            manifest.compressed,
            tokens,
            problems,
        )
        if goldens is None:
            return report
        report_progress("tokenizer", 0, 1)
        ids = compare_tokenizer(out, manifest, checkpoint)
        skipped, tokenizer = (ids, None) if isinstance(ids, str) else (None, ids)
        report = replace(report, tokenizer=tokenizer, tokenizer_skipped=skipped)

        exact = (MIN_COSINE, MIN_LOGIT_COSINE)
        usual = (
            (MIN_COSINE_COMPRESSED, MIN_LOGIT_COSINE_COMPRESSED) if manifest.compressed else exact
        )
        asked = (
            usual[0] if min_cosine is None else min_cosine,
            usual[1] if min_logit_cosine is None else min_logit_cosine,
        )
        trials = [_Trial(goldens.original, *asked)]
        trials += [_Trial(goldens.as_stored, *exact)] if goldens.as_stored else []
        proof = _Proof(out, manifest, runtime, options, decode_tokens, report_progress)
        ledger = Ledger() if precision == "engine" else None
        noted = {"ledger": ledger} if ledger is not None else {}
        predicted = replace(proof, options={**options, **computed, **noted})
        against_original, *others = predicted.compared(trials)
        report = replace(
            report,
            **vars(against_original),
            model_skipped=_why_no_model(manifest, goldens.original),
            as_stored=others[0] if others else None,
            compression=goldens.compression,
        )
        if ledger is not None:
            (exact_sums,) = proof.compared(trials[:1])
            engine = engine_report(out, manifest, ledger, against_original, exact_sums)
            report = replace(report, engine=engine)
    return replace(report, passed=not report.failures)


@dataclass(frozen=True)
class _Trial:
    """A golden, and the cosines that functions and the whole model have to reach against it."""

    golden: Golden
    min_cosine: float
    min_logit_cosine: float


@dataclass(frozen=True)
class _Proof:
    """Opens the shards of a conversion, stage by stage, once for everything that is compared."""

    out: Path
    manifest: Manifest
    runtime: str
    options: dict[str, Any]
    decode_tokens: int | None
    progress: Progress

    def compared(self, trials: Sequence[_Trial]) -> list[Comparison]:
        """Every function and the whole model against each golden; they are of the same prompts."""
        golden, ropes, dispatch = trials[0].golden, rope_tables(self.manifest), self._dispatch()
        parities = [self._parity(trial, ropes, dispatch) for trial in trials]
        rows: list[list[ShardResult | RoutingResult]] = [[] for _ in trials]
        passes = [] if _why_no_model(self.manifest, golden) else self._passes(golden)
        if 0 in self.manifest.layers:
            for parity, own in zip(parities, rows, strict=True):
                own.append(parity.embed())
        listed = stages(self.manifest)
        for number, stage in enumerate(listed):
            following = listed[number + 1 : number + 2]
            if isinstance(stage, int):
                self.progress(f"layer {stage}: experts", number, len(listed))
                for parity, own in zip(parities, rows, strict=True):
                    assert parity.experts is not None
                    own += parity.experts.functions(stage)
                continue
            self.progress(_label(stage[0]), number, len(listed))
            loaded = [self._open(shard) for shard in stage]
            for parity, own in zip(parities, rows, strict=True):
                own += parity.stage(loaded)
            experts = [
                dispatch.layers[step] for step in following if dispatch and isinstance(step, int)
            ]
            for model_pass in passes:
                model_pass.advance([*loaded, *experts], ropes, dispatch)
        return [_comparison(trial, own, passes) for trial, own in zip(trials, rows, strict=True)]

    def _parity(self, trial: _Trial, ropes: Ropes, dispatch: ExpertDispatch | None) -> Parity:
        experts = ExpertParity(trial.golden, dispatch, trial.min_cosine) if dispatch else None
        return Parity(
            self.out,
            self.manifest,
            trial.golden,
            trial.min_cosine,
            self.decode_tokens,
            ropes,
            experts,
        )

    def _passes(self, golden: Golden) -> list[ModelPass]:
        tail = decode_tail(self.manifest, golden, self.decode_tokens)
        return model_passes(
            self.manifest, golden.prompts, open_embeddings(self.out, self.manifest), tail
        )

    def _dispatch(self) -> ExpertDispatch | None:
        """What runs the expert functions, where there are any, in a share of the memory that is
        free."""
        layers, room = expert_layers(self.manifest), psutil.virtual_memory().available // 4
        if not layers:
            return None
        return ExpertDispatch(
            layers, open_cache(self.out, layers, self.runtime, room, **self.options)
        )

    def _open(self, shard: Shard) -> LoadedShard:
        package = open_package(self.out / shard.path, self.runtime, **self.options)
        loaded = LoadedShard(
            shard, {entry.name: package.function(entry.name) for entry in shard.functions}
        )
        check_shard(loaded, self.out)
        return loaded


def _comparison(
    trial: _Trial, rows: Sequence[ShardResult | RoutingResult], passes: Sequence[ModelPass]
) -> Comparison:
    return Comparison(
        tuple(row for row in rows if isinstance(row, ShardResult)),
        tuple(row for row in rows if isinstance(row, RoutingResult)),
        tuple(one.result(trial.golden, trial.min_logit_cosine) for one in passes),
    )


@dataclass(frozen=True)
class _Goldens:
    """The original model's, and for compressed weights the one of the model as it is stored, where
    there is one."""

    original: Golden
    as_stored: Golden | None
    compression: dict[str, dict[str, Any]]


def _goldens(
    out: Path,
    manifest: Manifest,
    checkpoint: Path | None,
    prompts: Path | None,
    scratch: Path,
    progress: Progress,
    damaged: bool,
) -> _Goldens | None:
    """The goldens to compare with; None when the files are damaged, which is reported without
    one."""
    if checkpoint is None and prompts is not None:
        raise UserError(
            "--prompts needs a checkpoint to run them on",
            "no --checkpoint",
            "give --checkpoint PATH",
        )
    if checkpoint is None and manifest.golden is None:
        raise UserError(
            f"{out} holds no golden to compare with",
            "no golden.safetensors",
            "give --checkpoint PATH, or convert with --golden",
        )
    if damaged:
        return None
    if checkpoint is None:
        assert manifest.golden is not None
        stored = read_golden(out / manifest.golden_as_stored) if manifest.golden_as_stored else None
        found = _Goldens(read_golden(out / manifest.golden), stored, manifest.compression)
    else:
        found = _captured(out, manifest, checkpoint, prompts, scratch, progress)
    for golden in (found.original, found.as_stored):
        if golden is not None:
            _require_same_model(golden, manifest, out)
            check_prompts(
                [list(prompt) for prompt in golden.prompts], manifest.vocab, manifest.context
            )
    return found


def _captured(
    out: Path,
    manifest: Manifest,
    checkpoint: Path,
    prompts: Path | None,
    scratch: Path,
    progress: Progress,
) -> _Goldens:
    """Goldens of the checkpoint, and of what the conversion made of it."""
    model = open_model(checkpoint, tuple(chain.from_iterable(manifest.left_out.values())))
    ids = read_prompts(prompts, checkpoint) if prompts else None
    capture_golden(
        model.checkpoint,
        layers=manifest.layers,
        prompts=ids,
        out=scratch / "golden.safetensors",
        context=manifest.context,
        experts=manifest.routing == "sparse",
        progress=progress,
    )
    original = read_golden(scratch / "golden.safetensors")
    _require_same_model(original, manifest, out)
    if not manifest.compressed:
        return _Goldens(original, None, {})
    errors = capture_as_stored(
        model, out, manifest, original, scratch / "as_stored.safetensors", progress
    )
    return _Goldens(
        original,
        read_golden(scratch / "as_stored.safetensors"),
        with_errors(manifest.compression, errors),
    )


def _require_same_model(golden: Golden, manifest: Manifest, out: Path) -> None:
    """A golden of another model is a mistake to name, not a failed gate."""
    found = {"layers of the model": golden.n_layers, "vocabulary": golden.logits.shape[1]}
    needed = {"layers of the model": manifest.n_layers, "vocabulary": manifest.vocab}
    missing = [layer for layer in manifest.layers if layer not in golden.layers]
    if not missing:
        found["hidden size"] = golden.layers[manifest.layers[0]].x.shape[1]
        needed["hidden size"] = manifest.d_model
    if missing or found != needed:
        raise UserError(
            f"the golden is not of the model in {out}",
            f"layers {missing} missing"
            if missing
            else ", ".join(
                f"{name} {found[name]} for {needed[name]}"
                for name in found
                if found[name] != needed[name]
            ),
            "give the checkpoint the shards were converted from",
        )
    alone = [
        layer for layer in expert_layers(manifest) if golden.layers[layer].expert_outputs is None
    ]
    if alone:
        raise UserError(
            "the golden does not say what single experts compute",
            f"layers {alone}",
            "convert again with --golden, or give --checkpoint PATH",
        )


def _label(shard: Shard) -> str:
    return shard.kind if shard.layer is None else f"layer {shard.layer}: {shard.kind}"


def _why_no_model(manifest: Manifest, golden: Golden) -> str | None:
    if manifest.layers != tuple(range(manifest.n_layers)):
        return f"only {len(manifest.layers)} of {manifest.n_layers} layers were converted"
    if not golden.complete:
        return "the golden does not cover every layer"
    return None
