"""The conversion pipeline: checkpoint -> plan -> templates -> shards -> manifest."""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ane_moe import stamping
from ane_moe.blocks.registry import TemplateKey
from ane_moe.checkpoint import Checkpoint, TensorSource, open_checkpoint
from ane_moe.checkpoint_tokenizer import TokenizerFiles, read_tokenizer, write_tokenizer
from ane_moe.compress.budget import fit_budget, measure_sensitivity, reach_cosine
from ane_moe.compress.calibration import FILE_NAME as CALIBRATION
from ane_moe.compress.calibration import Moments
from ane_moe.compress.recipe import role_of
from ane_moe.errors import UserError
from ane_moe.families import describe
from ane_moe.goldens import (
    GOLDEN,
    GOLDEN_AS_STORED,
    capture_goldens,
    finished,
    golden_key,
    keep_goldens,
    remove_goldens,
)
from ane_moe.manifest import Manifest, Shard, ShardFunction
from ane_moe.output_folder import MARKER, claim, identity, remove_strangers, require_disk
from ane_moe.package import disk_error, sha256
from ane_moe.plan import (
    MB,
    ConversionPlan,
    ConvertOptions,
    Recovery,
    ShardPlan,
    SourceFacts,
    make_plan,
)
from ane_moe.side_files import write_routers
from ane_moe.spec import ModelSpec, MoeSpec
from ane_moe.stamping import TOOLS, Done, reuse_shard, stamp_embedding, stamp_shard, trace_template
from ane_moe.trace import Template
from ane_moe.workers import Pool, open_pool, peak_memory_bytes, run, run_then, start

EMBED = "embed.bin"
BUILTIN_TEXT = "builtin"


@dataclass(frozen=True)
class Progress:
    """One step done. Bytes are of finished files; `peak_memory_bytes` is of this process and its workers, summed."""

    label: str
    written_bytes: int
    total_bytes: int
    peak_memory_bytes: int


@dataclass(frozen=True)
class ConvertReport:
    """`reused` shards were there already with the same content key. `golden_kept`:
    the goldens are those of an earlier run. `notes` are sentences on how the checkpoint was
    read."""

    folder: Path
    manifest: Manifest
    written: tuple[str, ...]
    reused: tuple[str, ...]
    peak_memory_bytes: int
    golden_kept: bool = False
    notes: tuple[str, ...] = ()


def plan(checkpoint: Path, options: ConvertOptions) -> ConversionPlan:
    """Check the checkpoint and say what `convert` would write, without reading weights. Raises UserError."""
    opened = open_checkpoint(checkpoint)
    planned = _plan(opened, options)[2]
    read_tokenizer(opened.folder)
    return planned


def _plan(
    opened: Checkpoint, options: ConvertOptions
) -> tuple[ModelSpec, dict[str, TensorSource], ConversionPlan]:
    ignore = options.ignore_tensors
    spec, sources = describe(opened, ignore)
    facts = SourceFacts(opened.notes, opened.left_out(sources, ignore))
    return spec, sources, replace(make_plan(spec, sources, options), source=facts)


def convert(
    checkpoint: Path,
    out: Path,
    options: ConvertOptions | None = None,
    *,
    workers: int = 1,
    golden: bool = False,
    prompts: Path | None = None,
    overwrite: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> ConvertReport:
    """Convert `checkpoint` into the shard folder `out`; an interrupted conversion goes on where it stopped.

    `golden` also captures golden.safetensors from Hugging Face's own model, on the `prompts` of a
    file or the built-in set, unless an earlier run did so of the same weights and prompts and there
    is no `overwrite`. Raises UserError for everything the user can mend; what is finished by then
    stays and is reused.
    """
    opened = open_checkpoint(checkpoint)
    spec, sources, conversion = _plan(opened, options or ConvertOptions())
    ids = _prompt_ids(opened.folder, conversion, prompts) if golden else None
    _require_text(conversion.options)
    tokenizer = read_tokenizer(opened.folder)
    earlier = None if overwrite else finished(out)
    claim(out, opened, conversion, overwrite)
    require_disk(out, conversion)
    meter = _Meter(conversion.disk_bytes, progress)
    try:
        kept = write_tokenizer(tokenizer, out)
        calibration = _calibration(opened.folder, out, conversion.options, meter)
        if calibration and (conversion.options.budget_mb or conversion.options.min_cosine):
            with open_pool(workers, stamping.__name__) as pool:
                conversion = _with_formats(pool, opened.folder, spec, sources, conversion, calibration, meter)
        with ThreadPoolExecutor(workers) as threads:        # hashing frees the interpreter's lock
            done = _finished(threads, opened.folder, out, conversion, calibration, meter)
        reused = tuple(sorted(shard.path for shard in done))
        idle = len(reused) == len(conversion.shards)        # processes take seconds to import
        with open_pool(1 if idle else workers, stamping.__name__) as pool:
            embedding = start(pool, stamp_embedding, opened.folder, sources["embed.weight"], out / EMBED,
                              conversion.embed_format)
            done += _stamp_rest(pool, opened.folder, out, conversion, calibration, set(reused),
                                meter)
            embed = meter.shard(embedding.result())
        write_routers(opened, sources, conversion.routers, out)
        manifest = _manifest(opened, conversion, done, embed.files, kept)
        if golden or (earlier and earlier.golden):
            keys = [shard.content_key for shard in (*done, embed)]
            key = golden_key(opened, sources, conversion, keys)
            manifest = replace(manifest, golden_key=key)
        goldens = keep_goldens(out, manifest, earlier, ids)
        if goldens is None and ids is not None:
            manifest = capture_goldens(opened.folder, out, conversion, manifest, ids, meter.golden)
        elif goldens is None:
            remove_goldens(out)
        manifest = _complete(goldens or manifest, conversion, out)
        remove_strangers(out, manifest)
        manifest.write(out)
        (out / MARKER).unlink()
    except OSError as error:
        raise disk_error(error, out / "the conversion") from error
    written = tuple(sorted(shard.path for shard in done if not shard.reused))
    notes = conversion.source.notes
    return ConvertReport(out, manifest, written, reused, meter.peak, goldens is not None, notes)


class _Meter:
    """Adds up progress over the processes."""

    def __init__(self, total: int, report: Callable[[Progress], None]):
        self._total, self._report, self._written = total, report, 0
        self._peaks: dict[int, int] = {}

    @property
    def peak(self) -> int:
        return sum(self._peaks.values())

    def shard(self, done: Done) -> Done:
        """Count one finished shard, and hand it on."""
        self.add(done.path, done.weight_bytes, done.process, done.peak_memory_bytes)
        return done

    def add(self, label: str, written: int, process: int, peak: int) -> None:
        self._written += written
        self._peaks[os.getpid()] = peak_memory_bytes()
        self._peaks[process] = max(peak, self._peaks.get(process, 0))
        self._report(Progress(label, self._written, self._total, self.peak))

    def golden(self, what: str, done: int, total: int) -> None:
        """Report the capture of goldens."""
        self.add(f"golden: {what} {done}/{total}", 0, os.getpid(), 0)


def _require_text(options: ConvertOptions) -> None:
    if options.calibrate not in (None, BUILTIN_TEXT) and not Path(str(options.calibrate)).is_file():
        raise UserError(f"{options.calibrate} is not a file", do=f"give a text to calibrate with, or `{BUILTIN_TEXT}`")
    if options.budget_mb is not None and options.min_cosine is not None:
        raise UserError("--budget-mb and --min-cosine exclude each other", do="give one of them")


def _calibration(checkpoint: Path, out: Path, options: ConvertOptions, meter: _Meter) -> Path | None:
    """The calibration file of these options, made now unless an earlier run left it; None when none is asked for."""
    path = out / CALIBRATION
    asked = options.calibrate or (BUILTIN_TEXT if options.budget_mb or options.min_cosine else None)
    if asked is None:
        path.unlink(missing_ok=True)
        return None
    from ane_moe.verification.hf_moments import calibrate, calibration_digest

    text = None if asked == BUILTIN_TEXT else Path(asked)
    if not path.is_file() or Moments(path).of != calibration_digest(checkpoint, text):
        def progress(what: str, done: int, total: int) -> None:
            meter.add(f"calibration: {what} {done}/{total}", 0, os.getpid(), 0)

        calibrate(checkpoint, text, progress, options.ignore_tensors).write(path)
    return path


def _with_formats(
    pool: Pool,
    checkpoint: Path,
    spec: ModelSpec,
    sources: dict[str, TensorSource],
    conversion: ConversionPlan,
    calibration: Path,
    meter: _Meter,
) -> ConversionPlan:
    """The plan with a format for each matrix, within the budget or the least cosine asked for."""
    options, measured = conversion.options, []
    for found in run(pool, measure_sensitivity, [(checkpoint, calibration, m) for m in conversion.matrices.values()]):
        measured += found
        meter.add(f"sensitivity: {len(measured)} matrices", 0, os.getpid(), 0)
    measured.sort(key=lambda entry: entry.tensor)
    if options.budget_mb is not None:
        matrices = sum(shard.payloads[name] for shard in conversion.shards for name, source in shard.weights.items()
                       if isinstance(source, TensorSource) and role_of(source.name)[0])  # fmt: skip
        formats = fit_budget(measured, int(options.budget_mb * MB) - (conversion.disk_bytes - matrices))
        name = f"budget {options.budget_mb:g} MB"
    else:
        formats = reach_cosine(measured, options.min_cosine or 0.0)
        name = f"cosine {options.min_cosine:g}"
    recipe = replace(options.recipe, name=name, overrides=formats)
    planned = make_plan(spec, sources, replace(options, recipe=recipe))
    return replace(planned, source=conversion.source)


def _finished(
    pool: Pool, checkpoint: Path, out: Path, conversion: ConversionPlan, calibration: Path | None, meter: _Meter
) -> list[Done]:
    """The shards an earlier run left complete, and of exactly these weights, options and tools."""
    present = [(checkpoint, out, shard, calibration) for shard in conversion.shards if (out / shard.path).exists()]
    return [meter.shard(done) for done in run(pool, reuse_shard, present) if done is not None]


def _stamp_rest(
    pool: Pool,
    checkpoint: Path,
    out: Path,
    conversion: ConversionPlan,
    calibration: Path | None,
    finished: set[str],
    meter: _Meter,
) -> list[Done]:
    """Trace one template per distinct block among the unfinished shards; write each shard as soon as it has its own."""
    rest = [shard for shard in conversion.shards if shard.path not in finished]
    keys = dict.fromkeys(key for shard in rest for key in shard.graphs.values())
    templates: dict[TemplateKey, Template] = {}

    def ready(traced: tuple[TemplateKey, Template]) -> Iterator[tuple[Any, ...]]:
        key, templates[key] = traced
        for shard in rest:
            if key in shard.graphs.values() and templates.keys() >= set(shard.graphs.values()):
                mine = {prefix: templates[graph] for prefix, graph in shard.graphs.items()}
                yield checkpoint, out, shard, mine, calibration

    stamped = run_then(pool, trace_template, [(key,) for key in keys], stamp_shard, ready)
    return [meter.shard(done) for done in stamped]


def _prompt_ids(
    checkpoint: Path, conversion: ConversionPlan, prompts: Path | None
) -> list[list[int]]:
    """The prompts of a file or the built-in ones, checked before hours go into their golden."""
    from ane_moe.verification.prompts import builtin_prompts, check_prompts, read_prompts

    if prompts is None:
        return builtin_prompts(checkpoint, conversion.spec.vocab, conversion.context)
    ids = read_prompts(prompts, checkpoint)
    check_prompts(ids, conversion.spec.vocab, conversion.context)
    return ids


def _manifest(
    checkpoint: Checkpoint,
    conversion: ConversionPlan,
    done: list[Done],
    files: dict[str, str],
    tokenizer: TokenizerFiles,
) -> Manifest:
    """The manifest but for what lies beside the shards."""
    spec, options = conversion.spec, conversion.options
    keys = {shard.path: shard.content_key for shard in done}
    files = files | {name: digest for shard in done for name, digest in shard.files.items()}
    return Manifest(
        family=spec.family,
        d_model=spec.d_model,
        vocab=spec.vocab,
        layers=conversion.layers,
        n_layers=len(spec.layers),
        context=conversion.context,
        cache_width=conversion.cache_width,
        routing=options.routing,
        state=options.state,
        layout=options.layout,
        prefill=options.prefill,
        weights=options.recipe.name,
        recipe=options.recipe.as_json(),
        embed=EMBED,
        embed_format=conversion.embed_format,
        ropes={name: asdict(rope) for name, rope in spec.ropes.items()},
        shards=tuple(_shard(shard, keys[shard.path]) for shard in conversion.shards),
        tokenizer=tokenizer.names,
        tokenizer_class=tokenizer.class_name,
        tokenizer_record=tokenizer.record,
        bos_id=spec.bos_id,
        eos_ids=spec.eos_ids,
        files=files,
        compression=_compression(conversion),
        moe=dict(_moe_facts(conversion)),
        versions={name: version(name) for name in TOOLS},
        source=identity(checkpoint, conversion),
        left_out=dict(conversion.source.left_out),
    )


def _complete(manifest: Manifest, conversion: ConversionPlan, out: Path) -> Manifest:
    """Add the goldens that are there, and the hashes of what lies beside the shards."""
    golden, as_stored = (name if (out / name).exists() else None for name in (GOLDEN, GOLDEN_AS_STORED))
    named = (golden, as_stored, CALIBRATION, manifest.tokenizer_record)
    beside = [name for name in named if name and (out / name).exists()]
    loose = (*manifest.tokenizer, *conversion.routers.values(), *beside)
    files = manifest.files | {name: sha256(out / name) for name in loose}
    return replace(manifest, golden=golden, golden_as_stored=as_stored, files=dict(sorted(files.items())))


def _compression(conversion: ConversionPlan) -> dict[str, dict[str, Any]]:
    """Formats, weights, bytes and bits by role, for what is not fp16; directions kept apart count as bytes."""
    roles: dict[str, dict[str, Any]] = {}
    for shard in conversion.shards:
        for name, source in shard.weights.items():
            tensor = source.source if isinstance(source, Recovery) else source
            role = role_of(tensor.name)[0] if isinstance(tensor, TensorSource) else None
            if role is None or (name not in shard.choices and not isinstance(source, Recovery)):
                continue
            facts = roles.setdefault(role, {"formats": {}, "weights": 0, "bytes": 0})
            facts["bytes"] += shard.payloads[name]
            if name in shard.choices:
                form, count = shard.choices[name].format, math.prod(source.shape)
                facts["weights"] += count
                facts["formats"][form] = facts["formats"].get(form, 0) + count
    if conversion.embed_format != "fp16":
        count = conversion.spec.vocab * conversion.spec.d_model
        roles["embedding"] = {"formats": {conversion.embed_format: count}, "weights": count,
                              "bytes": conversion.embed_bytes}  # fmt: skip
    return {role: facts | {"bits_per_weight": 8 * facts["bytes"] / facts["weights"]} for role, facts in roles.items()}


def _moe_facts(conversion: ConversionPlan) -> Iterable[tuple[str, dict[str, Any]]]:
    for layer in conversion.layers:
        ffn = conversion.spec.layers[layer].ffn
        if isinstance(ffn, MoeSpec):
            table = {"router": conversion.routers[layer]} if layer in conversion.routers else {}
            widths = {"expert_width": ffn.expert.width, "shared_width": ffn.shared.mlp.width if ffn.shared else 0}
            yield str(layer), {"experts": ffn.router.experts, "k": ffn.router.k} | widths | table


def _shard(plan: ShardPlan, content_key: str) -> Shard:
    return Shard(
        path=plan.path,
        kind=plan.kind,
        layer=plan.layer,
        functions=tuple(ShardFunction(name, tokens) for name, tokens in plan.functions),
        part=plan.part,
        parts=plan.parts,
        experts=plan.experts,
        groups=plan.groups,
        layers=plan.layers,
        rows=plan.rows,
        rope=plan.rope,
        window=plan.window,
        states=dict(plan.states),
        weight_bytes=plan.weight_bytes,
        content_key=content_key,
    )
