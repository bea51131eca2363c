"""The conversion pipeline: checkpoint -> plan -> templates -> shards -> manifest."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ane_moe.addresses import from_anywhere, output_place
from ane_moe.checkpoints.checkpoint import TensorSource
from ane_moe.checkpoints.hub import local_folder
from ane_moe.conversion import stamping
from ane_moe.conversion.admission import Admission
from ane_moe.conversion.early import write_early
from ane_moe.conversion.goldens import (
    GOLDEN,
    GOLDEN_AS_STORED,
    finished,
    golden_key,
    keep_goldens,
    remove_goldens,
    write_goldens,
)
from ane_moe.conversion.job import Job, open_job, plan_of
from ane_moe.conversion.output_folder import (
    MARKER,
    claim,
    identity,
    remove_strangers,
    require_disk,
    sweep_unfinished,
)
from ane_moe.conversion.plan import EMBED, MB, ConversionPlan, ConvertOptions, Recovery
from ane_moe.conversion.remote_output import (
    announce,
    deliver,
    destination,
    fetch_shards,
    present,
    with_scratch,
    with_sent_calibration,
)
from ane_moe.conversion.shard_form import form_of
from ane_moe.conversion.side_files import LABEL_FILES, copy_label_files, write_routers
from ane_moe.conversion.stamping import (
    Done,
    ShardJob,
    reuse_shard,
    shard_job,
    stamp_embedding,
    stamp_shard,
    tool_versions,
)
from ane_moe.conversion.stream_scale import (
    DividedStream,
    divided_stream,
    scaled,
    wanted_scales,
)
from ane_moe.conversion.templates import CORE_AI, asset_templates_of, templates_of
from ane_moe.conversion.workers import (
    LocalWorkers,
    Pool,
    Workers,
    open_workers,
    peak_memory_bytes,
    run,
    start,
    this_process,
)
from ane_moe.emit.coreml.template import Template
from ane_moe.emit.coreml.template_cache import TemplateCache
from ane_moe.errors import UserError
from ane_moe.files import disk_error, sha256
from ane_moe.formats.calibration import FILE_NAME as CALIBRATION
from ane_moe.formats.calibration import is_calibration_of
from ane_moe.manifest import Manifest
from ane_moe.model.spec import MoeSpec
from ane_moe.model.template_key import TemplateKey
from ane_moe.model.weight import EMBEDDING
from ane_moe.opened import open_model
from ane_moe.original.checkpoint_tokenizer import (
    TokenizerFiles,
    read_tokenizer,
    require_tokenizer,
    write_tokenizer,
)
from ane_moe.runtime.coreai.installed import DISTRIBUTIONS, require_packages

BUILTIN_TEXT = "builtin"
THIS_PROCESS = LocalWorkers(1, stamping.__name__)


@dataclass(frozen=True)
class Progress:
    """One step done. Bytes are of finished files; `peak_memory_bytes` is of this process and its
    workers, summed."""

    label: str
    written_bytes: int
    total_bytes: int
    peak_memory_bytes: int


@dataclass(frozen=True)
class ConvertReport:
    """`plan` is what was carried out, with the formats that a budget chose. `reused` shards were
    there already with the same content key. `golden_kept`: the goldens are those of an earlier run.
    `notes` are sentences on how the checkpoint was read, and on workers that were left out.
    `stream` is what became of hidden states that are too large for fp16."""

    folder: Path
    plan: ConversionPlan
    manifest: Manifest
    written: tuple[str, ...]
    reused: tuple[str, ...]
    peak_memory_bytes: int
    stream: DividedStream
    golden_kept: bool = False
    notes: tuple[str, ...] = ()


def plan(checkpoint: Path, options: ConvertOptions) -> ConversionPlan:
    """Check the checkpoint and say what `convert` would write, without reading weights. Raises
    UserError."""
    source = local_folder(checkpoint, ())
    model = open_model(source, options.ignore_tensors, options.adapters, options.adapter_mode)
    planned = plan_of(model, options)
    require_tokenizer(model.checkpoint.folder)
    return planned


def convert(
    checkpoint: Path,
    out: Path,
    options: ConvertOptions | None = None,
    *,
    workers: int = 1,
    cluster: str | None = None,
    golden: bool = False,
    prompts: Path | None = None,
    overwrite: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> ConvertReport:
    """Open `checkpoint` (as of `local_folder`), plan its conversion into the folder or address
    `out`, and `carry_out` that: by processes of this machine, or by the workers of a `cluster`, as
    of `open_workers`. Raises UserError as these do, and as of `output_place`."""
    out, options = output_place(out), options or ConvertOptions()
    source = local_folder(checkpoint, options.layers_read(golden), apart=cluster is not None)
    if cluster:  # whose workers are in folders of their own
        source, out = source.absolute(), from_anywhere(out)
    job = open_job(source, out, options)
    with open_workers(workers, stamping.__name__, cluster, out) as those:
        return carry_out(
            job,
            workers=those,
            golden=golden,
            prompts=prompts,
            overwrite=overwrite,
            progress=progress,
        )


def carry_out(
    job: Job,
    *,
    workers: Workers = THIS_PROCESS,
    golden: bool = False,
    prompts: Path | None = None,
    overwrite: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> ConvertReport:
    """Write the job's shards into its folder; an interrupted conversion goes on where it stopped.

    `golden` also captures golden.safetensors from Hugging Face's own model, on the `prompts` of a
    file or the built-in set, unless an earlier run did so of the same weights and prompts and there
    is no `overwrite`. Where a golden or a calibration shows hidden states that come near the end of
    fp16, or numbers inside a layer that do, they are divided by a power of two, and what was
    written before it was known is written again. Raises UserError for everything the user can mend;
    what is finished by then stays and is reused.
    """
    with with_scratch(job) as job_here:
        report = _carried_out(job_here, workers, golden, prompts, overwrite, progress)
    return replace(report, folder=job.out)


def _carried_out(
    job: Job,
    workers: Workers,
    golden: bool,
    prompts: Path | None,
    overwrite: bool,
    progress: Callable[[Progress], None],
) -> ConvertReport:
    out = job.out
    ids = _prompt_ids(job, prompts) if golden else None
    _require_text(job.plan.options)
    packages: tuple[str, ...] = ()
    if job.plan.options.format == "aimodel":
        require_packages()
        packages = DISTRIBUTIONS
    tokenizer = read_tokenizer(job.checkpoint.folder)
    earlier = None if overwrite else finished(out)
    claim(job, overwrite)
    announce(job)
    if job.away is None:  # whoever keeps an address says so when it is full
        require_disk(out, job.plan)
    files = {tensor.path for tensor in job.checkpoint.tensors.values()}
    workers.admit(Admission(files, job.away or out, MARKER, packages))
    meter = _Meter(job.plan.disk_bytes, progress)
    try:
        tokenizer_files = write_tokenizer(tokenizer, out)
        copy_label_files(job.checkpoint.folder, out)
        job = _calibrated(job, workers, meter)
        # What an earlier golden says is a guess, until this run has kept or captured one.
        job = scaled(job, wanted_scales(job, out / GOLDEN))
        while True:
            done, manifest, kept = _written(job, workers, meter, tokenizer_files, earlier, ids)
            settled = scaled(job, wanted_scales(job, out / GOLDEN))
            if settled is job:
                break
            job = settled
            meter.begin_again()
        sent, manifest = manifest.files, _complete(manifest, job)
        stream = divided_stream(job, out / GOLDEN)
        sweep_unfinished(out)  # of killed workers, whose calls others did
        remove_strangers(out, manifest)
        manifest.write(out)
        deliver(job, manifest, sent)
        (out / MARKER).unlink()
    except OSError as error:
        raise disk_error(error, out / "the conversion") from error
    reused = tuple(sorted(shard.path for shard in done if shard.reused))
    written = tuple(sorted(shard.path for shard in done if not shard.reused))
    notes = (*job.plan.source.notes, *workers.notes)
    return ConvertReport(out, job.plan, manifest, written, reused, meter.peak, stream, kept, notes)


def _written(
    job: Job,
    workers: Workers,
    meter: "_Meter",
    tokenizer: TokenizerFiles,
    earlier: Manifest | None,
    prompts: list[list[int]] | None,
) -> tuple[list[Done], Manifest, bool]:
    """Shards, tables and goldens of a job: what was done, its manifest, and whether goldens were
    kept. `prompts` are there if goldens were asked for."""
    out = job.out
    done, embed = _stamp(job, workers, meter)
    write_routers(job.checkpoint, job.sources, job.plan, out)
    facts = (job.spec.d_model, job.plan.options.ahead)
    manifest = _manifest(job, done, embed, tokenizer, write_early(job.plan.early, facts, out))
    if prompts is not None or (earlier and earlier.golden):
        written = [*done, embed] if embed else done
        key = golden_key(job, [one.content_key for one in written])
        manifest = replace(manifest, golden_key=key)
    kept = keep_goldens(out, manifest, earlier, prompts)
    if kept is not None:
        return done, kept, True
    if prompts is None:
        remove_goldens(out)
        return done, manifest, False
    fetch_shards(job, manifest)
    return done, write_goldens(job, manifest, prompts, meter.golden), False


class _Meter:
    """Adds up progress over the processes."""

    def __init__(self, total: int, report: Callable[[Progress], None]):
        self._total, self._report, self._written = total, report, 0
        self._peaks: dict[str, int] = {}

    @property
    def peak(self) -> int:
        return sum(self._peaks.values())

    def shard(self, done: Done) -> Done:
        """Count one finished shard, and hand it on."""
        self.add(done.path, done.weight_bytes, done.process, done.peak_memory_bytes)
        return done

    def add(self, label: str, written: int, process: str, peak: int) -> None:
        self._written += written
        self._peaks[this_process()] = peak_memory_bytes()
        self._peaks[process] = max(peak, self._peaks.get(process, 0))
        self._report(Progress(label, self._written, self._total, self.peak))

    def begin_again(self) -> None:
        """What was written is written anew."""
        self._written = 0

    def golden(self, what: str, done: int, total: int) -> None:
        """Report the capture of goldens."""
        self.add(f"golden: {what} {done}/{total}", 0, this_process(), 0)


def _require_text(options: ConvertOptions) -> None:
    if options.calibrate not in (None, BUILTIN_TEXT) and not Path(str(options.calibrate)).is_file():
        raise UserError(
            f"{options.calibrate} is not a file",
            do=f"give a text to calibrate with, or `{BUILTIN_TEXT}`",
        )
    if options.budget_mb is not None and options.min_cosine is not None:
        raise UserError("--budget-mb and --min-cosine exclude each other", do="give one of them")


def _calibrated(job: Job, workers: Workers, meter: _Meter) -> Job:
    """The job with its calibration, and with the formats that a budget or a least cosine chooses,
    where asked for."""
    job = with_sent_calibration(replace(job, calibration=_calibration(job, meter)))
    if not job.plan.options.chooses_formats:
        return job
    with workers.writers() as pool:
        return _with_formats(pool, job, meter)


def _stamp(job: Job, workers: Workers, meter: _Meter) -> tuple[list[Done], Done | None]:
    """Every shard, written or found finished, and the embedding table, where there is one."""
    with workers.readers() as pool:
        done = _finished(pool, job, meter)
    idle = len(done) == len(job.plan.shards)  # processes take seconds to import
    with nullcontext() if idle else workers.writers() as pool:
        embedding = _start_embedding(pool, job)
        done += _stamp_rest(pool, job, {shard.path for shard in done}, meter)
        return done, meter.shard(embedding.result()) if embedding else None


def _calibration(job: Job, meter: _Meter) -> Path | None:
    """The calibration file that the options ask for, made now unless an earlier run left it."""
    path, options = job.out / CALIBRATION, job.plan.options
    asked = options.calibrate or (BUILTIN_TEXT if options.chooses_formats else None)
    if asked is None:
        path.unlink(missing_ok=True)
        return None
    from ane_moe.original.calibrate import calibrate, calibration_digest

    text = None if asked == BUILTIN_TEXT else Path(asked)
    if not path.is_file() or not is_calibration_of(path, calibration_digest(job.checkpoint, text)):

        def progress(what: str, done: int, total: int) -> None:
            meter.add(f"calibration: {what} {done}/{total}", 0, this_process(), 0)

        calibrate(job, text, progress).write(path)
    return path


def _with_formats(pool: Pool, job: Job, meter: _Meter) -> Job:
    """The job with a format for each matrix, within the budget or the least cosine asked for."""
    from ane_moe.formats.budget import fit_budget, measure_sensitivity, reach_cosine  # torch

    plan, options, measured = job.plan, job.plan.options, []
    calibration = job.sent or job.calibration
    assert calibration is not None
    calls = [
        (job.checkpoint.holding({source.key for source in matrices}), calibration, matrices)
        for matrices in plan.matrices.values()
    ]
    for sensitivities in run(pool, measure_sensitivity, calls):
        measured += sensitivities
        meter.add(f"sensitivity: {len(measured)} matrices", 0, this_process(), 0)
    measured.sort(key=lambda entry: str(entry.tensor))
    if options.budget_mb is not None:
        budget = int(options.budget_mb * MB) - (plan.disk_bytes - _matrix_bytes(plan))
        formats, name = fit_budget(measured, budget), f"budget {options.budget_mb:g} MB"
    else:
        formats = reach_cosine(measured, options.min_cosine or 0.0)
        name = f"cosine {options.min_cosine:g}"
    overrides = {str(tensor): form for tensor, form in formats.items()}
    recipe = replace(options.recipe, name=name, overrides=overrides)
    return replace(job, plan=plan_of(job, replace(options, recipe=recipe)))


def _matrix_bytes(plan: ConversionPlan) -> int:
    """What the matrices that a recipe has a say in take on disk."""
    total = 0
    for shard in plan.shards:
        for name, source in shard.sources.items():
            total += shard.payloads[name] if isinstance(source, TensorSource) and source.role else 0
    return total


def _start_embedding(pool: Pool, job: Job) -> Future[Done] | None:
    """Begin to write the embedding table beside the shards, unless it is left out."""
    if job.plan.options.inputs == "embeds":
        (job.out / EMBED).unlink(missing_ok=True)
        return None
    source = job.sources[EMBEDDING]
    checkpoint = job.checkpoint.holding({source.key})
    path, form = job.out / EMBED, job.plan.embed_format
    return start(pool, stamp_embedding, checkpoint, source, path, form, destination(job))


def _finished(pool: Pool, job: Job, meter: _Meter) -> list[Done]:
    """The shards an earlier run left complete, and of exactly these weights, options and tools."""
    there = present(job)
    calls = [(shard_job(job, shard),) for shard in job.plan.shards if shard.path in there]
    return [meter.shard(done) for done in run(pool, reuse_shard, calls) if done is not None]


def _stamp_rest(pool: Pool, job: Job, finished: set[str], meter: _Meter) -> list[Done]:
    """Write each unfinished shard as soon as it has its templates, one for each distinct block."""
    rest = [shard for shard in job.plan.shards if shard.path not in finished]
    keys = dict.fromkeys(key for shard in rest for key in shard.graphs.values())

    def ready() -> Iterator[tuple[ShardJob, dict[str, Template]]]:
        yield from ((shard_job(job, shard), {}) for shard in rest if not shard.graphs)
        templates: dict[TemplateKey, Template] = {}
        for key, template in _templates(job, keys):
            templates[key] = template
            for shard in rest:
                if key in shard.graphs.values() and templates.keys() >= set(shard.graphs.values()):
                    own = {prefix: templates[graph] for prefix, graph in shard.graphs.items()}
                    yield shard_job(job, shard), own

    return [meter.shard(done) for done in run(pool, stamp_shard, ready())]


def _templates(job: Job, keys: Collection[TemplateKey]) -> Iterator[tuple[TemplateKey, Template]]:
    if job.plan.options.format == "aimodel":
        return asset_templates_of(keys, TemplateCache(), TemplateCache(making=CORE_AI))
    return templates_of(keys, TemplateCache())


def _prompt_ids(job: Job, prompts: Path | None) -> list[list[int]]:
    """The prompts of a file or the built-in ones, checked before hours go into their golden."""
    from ane_moe.original.prompts import builtin_prompts, check_prompts, read_prompts

    if prompts is None:
        plan = job.plan
        return builtin_prompts(job.checkpoint.folder, job.spec.vocab, plan.context, plan.lengths)
    ids = read_prompts(prompts, job.checkpoint.folder)
    check_prompts(ids, job.spec.vocab, job.plan.context)
    return ids


def _manifest(
    job: Job,
    done: list[Done],
    embed: Done | None,
    tokenizer: TokenizerFiles,
    early: str | None,
) -> Manifest:
    """The manifest but for what lies beside the shards."""
    spec, plan, options = job.spec, job.plan, job.plan.options
    keys = {shard.path: shard.content_key for shard in done}
    written = [*done, embed] if embed else done
    files = {name: digest for one in written for name, digest in one.files.items()}
    return Manifest(
        family=spec.family,
        d_model=spec.d_model,
        vocab=spec.vocab,
        layers=plan.layers,
        n_layers=len(spec.layers),
        context=plan.context,
        cache_width=plan.cache_width,
        routing=options.routing,
        state=options.state,
        layout=options.layout,
        prefill=0 if plan.lengths else options.prefill,
        lengths=plan.lengths,
        labels=spec.head.labels,
        weights=options.recipe.name,
        compressed=plan.compressed,
        recipe=options.recipe.as_json(),
        embed=EMBED if embed is not None else None,
        embed_scale=spec.embed_scale,
        embed_format=plan.embed_format,
        ropes={name: asdict(rope) for name, rope in spec.ropes.items()},
        shards=tuple(shard.finished(keys[shard.path]) for shard in plan.shards),
        tokenizer=tokenizer.names,
        tokenizer_class=tokenizer.class_name,
        tokenizer_record=tokenizer.record,
        bos_id=spec.bos_id,
        eos_ids=spec.eos_ids,
        files=files,
        compression=_compression(plan),
        moe=dict(moe_facts(plan)),
        halves={str(layer): scopes for layer, scopes in plan.halves.items()},
        versions=tool_versions(*map(form_of, plan.shards)),
        source=identity(job),
        origin=job.checkpoint.origin,
        left_out=dict(plan.source.left_out),
        stream_scale=spec.stream_scale,
        tracks=asdict(plan.synchronisations) if plan.synchronisations else {},
        inner={str(layer): asdict(scale) for layer, scale in spec.inner.items()},
        adapters={name: {} for name in job.adapters},
        early=early,
    )


def _complete(manifest: Manifest, job: Job) -> Manifest:
    """Add the goldens that are there, and the hashes of what lies beside the shards."""
    out = job.out
    golden, as_stored = (
        name if (out / name).exists() else None for name in (GOLDEN, GOLDEN_AS_STORED)
    )
    of_adapters = [name for facts in manifest.adapters.values() for name in facts.values()]
    goldens = (golden, as_stored, *(name for name in of_adapters if isinstance(name, str)))
    named = (*goldens, manifest.early, CALIBRATION, manifest.tokenizer_record, *LABEL_FILES)
    beside = [name for name in named if name and (out / name).exists()]
    loose = (*manifest.tokenizer, *job.plan.routers.values(), *beside)
    files = manifest.files | {name: sha256(out / name) for name in loose}
    return replace(
        manifest, golden=golden, golden_as_stored=as_stored, files=dict(sorted(files.items()))
    )


def _compression(plan: ConversionPlan) -> dict[str, dict[str, Any]]:
    """Formats, weights, bytes and bits by role, for what is not fp16; directions kept apart count
    as bytes."""
    roles: dict[str, dict[str, Any]] = {}
    for shard in plan.shards:
        for name, source in shard.sources.items():
            apart = isinstance(source, Recovery) and not source.more  # of no adapter
            tensor = source.source if isinstance(source, Recovery) else source
            role = tensor.role if isinstance(tensor, TensorSource) else None
            if role is None or (name not in shard.choices and not apart):
                continue
            facts = roles.setdefault(role, {"formats": {}, "weights": 0, "bytes": 0})
            facts["bytes"] += shard.payloads[name]
            if name in shard.choices:
                form, count = shard.choices[name].format, math.prod(source.shape)
                facts["weights"] += count
                facts["formats"][form] = facts["formats"].get(form, 0) + count
    if plan.embed_format != "fp16":
        count = plan.spec.vocab * plan.spec.d_model
        table = {"formats": {plan.embed_format: count}, "weights": count, "bytes": plan.embed_bytes}
        roles["embedding"] = table
    for facts in roles.values():
        facts["bits_per_weight"] = 8 * facts["bytes"] / facts["weights"]
    return roles


def moe_facts(plan: ConversionPlan) -> Iterable[tuple[str, dict[str, Any]]]:
    """What a manifest says of each layer with experts."""
    rankings, routers, early = plan.rankings, plan.routers, plan.early
    for layer in plan.layers:
        ffn = plan.spec.layers[layer].ffn
        if isinstance(ffn, MoeSpec):
            idle = getattr(ffn.router, "idle", 0)
            facts = {"experts": ffn.router.experts, "k": ffn.router.k}
            further = {
                "router": routers.get(layer),
                "ranking": rankings[layer].as_json() if layer in rankings else None,
                "guesses": early[layer].layer if layer in early else None,
                "idle": idle or None,
            }
            yield str(layer), facts | {name: one for name, one in further.items() if one}
