"""Prove a conversion right: its files, every function of every shard, its routing, and the whole model."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import psutil

from ane_moe.errors import UserError
from ane_moe.loop.experts import ExpertDispatch, expert_layers, open_cache
from ane_moe.manifest import Manifest, Shard, read_manifest
from ane_moe.opened import open_model
from ane_moe.original.capture import capture_golden
from ane_moe.original.golden import Golden, read_golden
from ane_moe.original.prompts import check_prompts, read_prompts
from ane_moe.original.stored_model import capture_as_stored, with_errors
from ane_moe.progress import Progress, silent
from ane_moe.runtime import load_package, resolve_runtime
from ane_moe.verification.expert_parity import ExpertParity
from ane_moe.verification.integrity import check_integrity
from ane_moe.verification.parity import Parity
from ane_moe.verification.result import Comparison, RoutingResult, ShardResult, VerifyReport
from ane_moe.verification.stage import stages
from ane_moe.verification.tokenizer_parity import compare_tokenizer
from ane_moe.verification.whole_model import Passes, WholeModel

# The cosine of a delta below which a function fails: 0.97 is the field's usual gate; fp16 weights do far better.
MIN_COSINE = 0.999
MIN_COSINE_COMPRESSED = 0.97
# The whole model adds up the errors of its layers, and single tokens may be routed otherwise at a near tie.
MIN_LOGIT_COSINE = 0.99
MIN_LOGIT_COSINE_COMPRESSED = 0.9
DECODE_TOKENS = 32


def verify(out: Path, *, checkpoint: Path | None = None, prompts: Path | None = None, runtime: str = "auto",
           min_cosine: float | None = None, min_logit_cosine: float | None = None,
           decode_tokens: int | None = DECODE_TOKENS, progress: Progress | None = None,
           **options: Any) -> VerifyReport:
    """Check the conversion in `out` against a golden: the one inside, or one captured from
    `checkpoint` now. Its tokenizer is compared with what the checkpoint's gave then, or gives now.

    `decode_tokens` is about how many tokens go through one-token calls where prefill covers all of them (None: all).
    `options` go to the runtime. When files are damaged nothing is run and the
    report says which. Raises UserError when there is no conversion, no golden to compare with, or a golden or prompts
    of something else.
    """
    report_progress = progress or silent
    manifest = read_manifest(out)
    runtime = resolve_runtime(runtime)
    problems = check_integrity(out, manifest, report_progress)
    with tempfile.TemporaryDirectory(prefix="ane-moe-") as scratch:
        goldens = _goldens(out, manifest, checkpoint, prompts, Path(scratch), report_progress, bool(problems))
        tokens = sum(map(len, goldens.original.prompts)) if goldens else 0
        report = VerifyReport(False, str(out), runtime, manifest.routing, manifest.weights, manifest.compressed, tokens,
                              problems)
        if goldens is None:
            return report
        report_progress("tokenizer", 0, 1)
        ids = compare_tokenizer(out, manifest, checkpoint)
        skipped, tokenizer = (ids, None) if isinstance(ids, str) else (None, ids)
        report = replace(report, tokenizer=tokenizer, tokenizer_skipped=skipped)

        # Both goldens have the same prompts: the shards run them once.
        passes: Passes | None = {} if goldens.as_stored else None

        def compare(golden: Golden, limits: tuple[float, float]) -> Comparison:
            return _compared(out, manifest, golden, runtime, options, limits, decode_tokens,
                             report_progress, passes)

        exact = (MIN_COSINE, MIN_LOGIT_COSINE)
        usual = (MIN_COSINE_COMPRESSED, MIN_LOGIT_COSINE_COMPRESSED) if manifest.compressed else exact
        asked = (usual[0] if min_cosine is None else min_cosine,
                 usual[1] if min_logit_cosine is None else min_logit_cosine)
        as_stored = compare(goldens.as_stored, exact) if goldens.as_stored else None
        against_original = compare(goldens.original, asked)
        report = replace(report, **vars(against_original), model_skipped=_why_no_model(manifest, goldens.original),
                         as_stored=as_stored, compression=goldens.compression)
    return replace(report, passed=not report.failures)


def _compared(out: Path, manifest: Manifest, golden: Golden, runtime: str, options: dict[str, Any],
              limits: tuple[float, float], decode_tokens: int | None, progress: Progress,
              passes: Passes | None) -> Comparison:
    parity = Parity(out, manifest, golden, lambda path, name: load_package(path, name, runtime, **options), limits[0],
                    decode_tokens, _experts(out, manifest, golden, runtime, options, limits[0]))
    rows = list(_functions(parity, progress))
    model = WholeModel(out, manifest, golden, runtime, options, limits[1], decode_tokens, progress,
                       passes)
    return Comparison(tuple(row for row in rows if isinstance(row, ShardResult)),
                      tuple(row for row in rows if isinstance(row, RoutingResult)),
                      () if _why_no_model(manifest, golden) else tuple(model.results()))


def _experts(out: Path, manifest: Manifest, golden: Golden, runtime: str, options: dict[str, Any],
             min_cosine: float) -> ExpertParity | None:
    """What runs the expert functions, where there are any, in a share of the memory that is free."""
    layers = expert_layers(manifest)
    cache = open_cache(out, layers, runtime, psutil.virtual_memory().available // 4, **options)
    return ExpertParity(golden, ExpertDispatch(layers, cache), min_cosine) if layers else None


@dataclass(frozen=True)
class _Goldens:
    """The original model's, and for compressed weights the one of the model as it is stored, where there is one."""

    original: Golden
    as_stored: Golden | None
    compression: dict[str, dict[str, Any]]


def _goldens(out: Path, manifest: Manifest, checkpoint: Path | None, prompts: Path | None, scratch: Path,
             progress: Progress, damaged: bool) -> _Goldens | None:
    """The goldens to compare with; None when the files are damaged, which is reported without one."""
    if checkpoint is None and prompts is not None:
        raise UserError("--prompts needs a checkpoint to run them on", "no --checkpoint", "give --checkpoint PATH")
    if checkpoint is None and manifest.golden is None:
        raise UserError(f"{out} holds no golden to compare with", "no golden.safetensors",
                        "give --checkpoint PATH, or convert with --golden")
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
            check_prompts([list(prompt) for prompt in golden.prompts], manifest.vocab, manifest.context)
    return found


def _captured(out: Path, manifest: Manifest, checkpoint: Path, prompts: Path | None, scratch: Path,
              progress: Progress) -> _Goldens:
    """Goldens of the checkpoint, and of what the conversion made of it."""
    model = open_model(checkpoint, tuple(chain.from_iterable(manifest.left_out.values())))
    ids = read_prompts(prompts, checkpoint) if prompts else None
    capture_golden(model.checkpoint, layers=manifest.layers, prompts=ids, out=scratch / "golden.safetensors",
                   context=manifest.context, experts=manifest.routing == "sparse", progress=progress)
    original = read_golden(scratch / "golden.safetensors")
    _require_same_model(original, manifest, out)
    if not manifest.compressed:
        return _Goldens(original, None, {})
    errors = capture_as_stored(model, out, manifest, original, scratch / "as_stored.safetensors", progress)
    return _Goldens(original, read_golden(scratch / "as_stored.safetensors"), with_errors(manifest.compression, errors))


def _require_same_model(golden: Golden, manifest: Manifest, out: Path) -> None:
    """A golden of another model is a mistake to name, not a failed gate."""
    found = {"layers of the model": golden.n_layers, "vocabulary": golden.logits.shape[1]}
    needed = {"layers of the model": manifest.n_layers, "vocabulary": manifest.vocab}
    missing = [layer for layer in manifest.layers if layer not in golden.layers]
    if not missing:
        found["hidden size"] = golden.layers[manifest.layers[0]].x.shape[1]
        needed["hidden size"] = manifest.d_model
    if missing or found != needed:
        raise UserError(f"the golden is not of the model in {out}", f"layers {missing} missing" if missing else
                        ", ".join(f"{name} {found[name]} for {needed[name]}" for name in found
                                  if found[name] != needed[name]),
                        "give the checkpoint the shards were converted from")
    alone = [layer for layer in expert_layers(manifest) if golden.layers[layer].expert_outputs is None]
    if alone:
        raise UserError("the golden does not say what single experts compute", f"layers {alone}",
                        "convert again with --golden, or give --checkpoint PATH")


def _functions(parity: Parity, progress: Progress) -> Iterator[ShardResult | RoutingResult]:
    if 0 in parity.manifest.layers:
        yield parity.embed()
    listed = stages(parity.manifest)
    for number, step in enumerate(listed):
        if isinstance(step, int):
            assert parity.experts is not None
            progress(f"layer {step}: experts", number, len(listed))
            yield from parity.experts.functions(step)
        else:
            progress(_label(step[0]), number, len(listed))
            yield from parity.stage(step)


def _label(shard: Shard) -> str:
    return shard.kind if shard.layer is None else f"layer {shard.layer}: {shard.kind}"


def _why_no_model(manifest: Manifest, golden: Golden) -> str | None:
    if manifest.layers != tuple(range(manifest.n_layers)):
        return f"only {len(manifest.layers)} of {manifest.n_layers} layers were converted"
    if not golden.complete:
        return "the golden does not cover every layer"
    return None
