"""The conversion pipeline: checkpoint -> plan -> templates -> shards -> manifest."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import torch

from ane_moe.blocks.ports import Shape
from ane_moe.blocks.registry import TemplateKey
from ane_moe.checkpoint import Checkpoint, TensorSource, open_checkpoint
from ane_moe.errors import UserError
from ane_moe.families import describe
from ane_moe.manifest import FILE_NAME, Manifest, Shard, ShardFunction, read_manifest
from ane_moe.package import ContentKey, disk_error, file_hashes, read_content_key, remove_unfinished, sha256, stamp
from ane_moe.plan import MB, ROUTERS, ConversionPlan, ConvertOptions, OneHot, ShardPlan, make_plan
from ane_moe.side_files import copy_tokenizer, write_embedding, write_routers
from ane_moe.spec import MoeSpec
from ane_moe.trace import Template, make_template

T = TypeVar("T")

MARKER = ".converting.json"  # present while a conversion is unfinished: which one it is
EMBED = "embed.bin"
GOLDEN = "golden.safetensors"
TOOLS = ("ane-moe", "coremltools", "torch")


@dataclass(frozen=True)
class Progress:
    """One step done. Bytes are of finished files; `peak_memory_bytes` is of this process and its workers, summed."""

    label: str
    written_bytes: int
    total_bytes: int
    peak_memory_bytes: int


@dataclass(frozen=True)
class ConvertReport:
    """`reused` shards were there already with the same content key."""

    folder: Path
    manifest: Manifest
    written: tuple[str, ...]
    reused: tuple[str, ...]
    peak_memory_bytes: int


@dataclass(frozen=True)
class _Done:
    """What a worker reports of one shard."""

    path: str
    content_key: str
    weight_bytes: int
    reused: bool
    files: dict[str, str]
    peak_memory_bytes: int
    process: int


def plan(checkpoint: Path, options: ConvertOptions) -> ConversionPlan:
    """Check the checkpoint and say what `convert` would write, without reading weights. Raises UserError."""
    spec, sources = describe(open_checkpoint(checkpoint))
    return make_plan(spec, sources, options)


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

    `golden` also captures golden.safetensors from Hugging Face's own model, on the `prompts` of a file or the built-in
    set. Raises UserError for everything the user can mend; what is finished by then stays and is reused.
    """
    opened = open_checkpoint(checkpoint)
    spec, sources = describe(opened)
    conversion = make_plan(spec, sources, options or ConvertOptions())
    _claim(out, opened, conversion, overwrite)
    _require_disk(out, conversion)
    meter = _Meter(conversion.disk_bytes, progress)
    try:
        with _pool(workers) as pool:
            embedding = _start(pool, _write_embedding, opened.folder, sources["embed.weight"], out / EMBED)
            done = _finished(pool, opened.folder, out, conversion, meter)
            done += _stamp_rest(pool, opened.folder, out, conversion, {shard.path for shard in done}, meter)
            files = meter.shard(embedding.result()).files
        write_routers(opened, sources, conversion.routers, out)
        tokenizer = copy_tokenizer(opened.folder, out)
        if golden:
            _capture(opened.folder, out, conversion, prompts, meter)
        elif not all(shard.reused for shard in done):
            (out / GOLDEN).unlink(missing_ok=True)  # of other weights
        manifest = _manifest(opened, conversion, done, files, tokenizer, out)
        _remove_strangers(out, manifest)
        manifest.write(out)
        (out / MARKER).unlink()
    except OSError as error:
        raise disk_error(error, out / "the conversion") from error
    reused = tuple(sorted(shard.path for shard in done if shard.reused))
    written = tuple(sorted(shard.path for shard in done if not shard.reused))
    return ConvertReport(out, manifest, written, reused, meter.peak)


class _Meter:
    """Adds up progress over the processes."""

    def __init__(self, total: int, report: Callable[[Progress], None]):
        self._total, self._report, self._written = total, report, 0
        self._peaks: dict[int, int] = {}

    @property
    def peak(self) -> int:
        return sum(self._peaks.values())

    def shard(self, done: "_Done") -> "_Done":
        """Count one finished shard, and hand it on."""
        self.add(done.path, done.weight_bytes, done.process, done.peak_memory_bytes)
        return done

    def add(self, label: str, written: int, process: int, peak: int) -> None:
        self._written += written
        self._peaks[os.getpid()] = peak_memory_bytes()
        self._peaks[process] = max(peak, self._peaks.get(process, 0))
        self._report(Progress(label, self._written, self._total, self.peak))


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if psutil.MACOS else peak * 1024


Pool = ProcessPoolExecutor | None       # None: everything in this process


def _pool(workers: int) -> AbstractContextManager[Pool]:
    """Worker processes. Off macOS they are forked from a server that has imported everything once; macOS frameworks
    do not survive a fork."""
    if workers == 1:
        return nullcontext()
    context = get_context("spawn" if psutil.MACOS else "forkserver")
    if not psutil.MACOS:
        context.set_forkserver_preload([__name__])
    # One thread each: the workers are the parallelism, and waiting OpenMP threads would spin on each other's cores.
    return ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,))


def _start(pool: Pool, function: Callable[..., T], *arguments: Any) -> "Future[T]":
    """Begin one call beside the rest; without a pool it is done at once."""
    if pool is not None:
        return pool.submit(function, *arguments)
    future: Future[T] = Future()
    future.set_result(function(*arguments))
    return future


def _run(pool: Pool, function: Callable[..., T], calls: Sequence[tuple[Any, ...]]) -> Iterator[T]:
    """The results of `calls`, as they come; on the first error or Ctrl-C nothing new is begun."""
    if pool is None:
        yield from (function(*arguments) for arguments in calls)
        return
    futures = [pool.submit(function, *arguments) for arguments in calls]
    try:
        yield from (future.result() for future in as_completed(futures))
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise


def _claim(out: Path, checkpoint: Checkpoint, conversion: ConversionPlan, overwrite: bool) -> None:
    """Take the output folder: a new or empty one, or one that an earlier run of the same conversion began."""
    what = _identity(checkpoint, conversion)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is not a folder", do="name another output folder")
    marker = out / MARKER
    if out.is_dir() and any(out.iterdir()):
        found = _identity_on_disk(out)
        if found is None and not marker.exists():
            raise UserError(f"{out} holds something else", f"no {FILE_NAME} in it", "name another output folder")
        if found != what and not overwrite:
            raise UserError(f"{out} holds another conversion", do="name another folder, or replace it with --overwrite")
        remove_unfinished(out)
    out.mkdir(parents=True, exist_ok=True)
    _write_text(marker, json.dumps(what, sort_keys=True))
    (out / FILE_NAME).unlink(missing_ok=True)


def _identity(checkpoint: Checkpoint, conversion: ConversionPlan) -> dict[str, str]:
    """What tells two conversions apart at a glance; the content keys tell for certain."""
    return {
        "config": ContentKey(json.dumps(checkpoint.config, sort_keys=True)).digest(),
        "options": repr(replace(conversion.options, context=conversion.context, layers=conversion.layers)),
    }


def _identity_on_disk(out: Path) -> dict[str, str] | None:
    if (out / MARKER).exists():
        try:
            return dict(json.loads((out / MARKER).read_text()))
        except ValueError:
            return None
    return read_manifest(out).source if (out / FILE_NAME).exists() else None


def _require_disk(out: Path, conversion: ConversionPlan) -> None:
    present = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    needed, free = conversion.disk_bytes - present, shutil.disk_usage(out).free
    if needed > free:
        raise UserError(f"the disk is too full for {out}", f"{free / MB:.0f} MB free, {needed / MB:.0f} MB needed")


def _finished(pool: Pool, checkpoint: Path, out: Path, conversion: ConversionPlan, meter: _Meter) -> list[_Done]:
    """The shards an earlier run left complete, and of exactly these weights, options and tools."""
    present = [(checkpoint, out, shard) for shard in conversion.shards if (out / shard.path).exists()]
    return [meter.shard(done) for done in _run(pool, _reuse, present) if done is not None]


def _stamp_rest(
    pool: Pool, checkpoint: Path, out: Path, conversion: ConversionPlan, finished: set[str], meter: _Meter
) -> list[_Done]:
    """Trace one template per distinct block among the unfinished shards, then write them."""
    rest = [shard for shard in conversion.shards if shard.path not in finished]
    keys = dict.fromkeys(key for shard in rest for key in shard.graphs.values())
    templates = dict(_run(pool, _trace, [(key,) for key in keys]))
    calls = [(checkpoint, out, shard, {prefix: templates[key] for prefix, key in shard.graphs.items()})
             for shard in rest]  # fmt: skip
    return [meter.shard(done) for done in _run(pool, _stamp, calls)]


def _trace(key: TemplateKey) -> tuple[TemplateKey, Template]:
    return key, make_template(key)


def _reuse(checkpoint: Path, out: Path, shard: ShardPlan) -> _Done | None:
    """The shard as it lies on disk, if its content key is the one it would get."""
    key = read_content_key(out / shard.path)
    if key is None or key != _expected_key(open_checkpoint(checkpoint), shard):
        return None
    return _report(out, shard, key, reused=True)


def _stamp(checkpoint: Path, out: Path, shard: ShardPlan, templates: dict[str, Template]) -> _Done:
    key, path = _key(shard), out / shard.path
    path.parent.mkdir(parents=True, exist_ok=True)
    written = stamp(templates, _values(open_checkpoint(checkpoint), shard, key), key, path)
    return _report(out, shard, written.content_key, reused=False)


def _report(out: Path, shard: ShardPlan, content_key: str, reused: bool) -> _Done:
    files = {f"{shard.path}/{name}": digest for name, digest in file_hashes(out / shard.path).items()}
    return _Done(shard.path, content_key, shard.weight_bytes, reused, files, peak_memory_bytes(), os.getpid())


def _key(shard: ShardPlan) -> ContentKey:
    return ContentKey(shard.graphs, {name: version(name) for name in TOOLS})


def _expected_key(checkpoint: Checkpoint, shard: ShardPlan) -> str:
    """The content key the shard would get: reads the weights, writes nothing."""
    key = _key(shard)
    for source in shard.weights.values():
        if isinstance(source, OneHot):
            key.update(repr(source).encode())
        else:
            checkpoint.feed(source, key)
    return key.digest()


def _values(checkpoint: Checkpoint, shard: ShardPlan, key: ContentKey) -> Iterator[tuple[str, np.ndarray]]:
    """Each weight of the shard, valid until the next one of its shape: fresh memory costs more than the reading."""
    buffers: dict[Shape, np.ndarray] = {}
    for name, source in shard.weights.items():
        if isinstance(source, OneHot):
            key.update(repr(source).encode())
            yield name, np.eye(source.rows, source.columns, source.first, dtype=np.float16)
        else:
            buffer = buffers.setdefault(source.shape, np.empty(source.shape, np.float16))
            yield name, checkpoint.read(source, out=buffer, hasher=key)


def _write_embedding(checkpoint: Path, source: TensorSource, path: Path) -> _Done:
    write_embedding(open_checkpoint(checkpoint), source, path)
    files = {path.name: sha256(path)}
    return _Done(path.name, "", path.stat().st_size, False, files, peak_memory_bytes(), os.getpid())


def _capture(checkpoint: Path, out: Path, conversion: ConversionPlan, prompts: Path | None, meter: _Meter) -> None:
    from ane_moe.verification.golden import capture_golden  # transformers takes seconds to import
    from ane_moe.verification.prompts import read_prompts

    capture_golden(
        checkpoint,
        layers=conversion.layers,
        prompts=None if prompts is None else read_prompts(prompts, checkpoint),
        out=out / GOLDEN,
        context=conversion.context,
        experts=conversion.options.routing == "sparse",
        progress=lambda what, done, total: meter.add(f"golden: {what} {done}/{total}", 0, os.getpid(), 0),
    )


def _manifest(
    checkpoint: Checkpoint,
    conversion: ConversionPlan,
    done: list[_Done],
    files: dict[str, str],
    tokenizer: tuple[str, ...],
    out: Path,
) -> Manifest:
    spec, options = conversion.spec, conversion.options
    keys = {shard.path: shard.content_key for shard in done}
    golden = GOLDEN if (out / GOLDEN).exists() else None
    files = files | {name: digest for shard in done for name, digest in shard.files.items()}
    loose = (*tokenizer, *conversion.routers.values(), *([golden] if golden else []))
    files |= {name: sha256(out / name) for name in loose}
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
        weights="fp16",
        embed=EMBED,
        ropes={name: asdict(rope) for name, rope in spec.ropes.items()},
        shards=tuple(_shard(shard, keys[shard.path]) for shard in conversion.shards),
        tokenizer=tokenizer,
        bos_id=spec.bos_id,
        eos_ids=spec.eos_ids,
        golden=golden,
        files=dict(sorted(files.items())),
        moe=dict(_moe_facts(conversion)),
        versions={name: version(name) for name in TOOLS},
        source=_identity(checkpoint, conversion),
    )


def _moe_facts(conversion: ConversionPlan) -> Iterable[tuple[str, dict[str, Any]]]:
    for layer in conversion.layers:
        ffn = conversion.spec.layers[layer].ffn
        if isinstance(ffn, MoeSpec):
            table = {"router": conversion.routers[layer]} if layer in conversion.routers else {}
            yield str(layer), {"experts": ffn.router.experts, "k": ffn.router.k} | table


def _shard(plan: ShardPlan, content_key: str) -> Shard:
    return Shard(
        path=plan.path,
        kind=plan.kind,
        layer=plan.layer,
        functions=tuple(ShardFunction(name, tokens) for name, tokens in plan.functions),
        part=plan.part,
        parts=plan.parts,
        experts=plan.experts,
        rows=plan.rows,
        rope=plan.rope,
        window=plan.window,
        states=dict(plan.states),
        weight_bytes=plan.weight_bytes,
        content_key=content_key,
    )


def _remove_strangers(out: Path, manifest: Manifest) -> None:
    """Shards and router tables of an earlier conversion with other options, which this one does not name."""
    kept = {shard.path for shard in manifest.shards}
    for path in out.rglob("*.mlpackage"):
        if path.relative_to(out).as_posix() not in kept:
            shutil.rmtree(path)
    for path in (out / ROUTERS).glob("*"):
        if path.relative_to(out).as_posix() not in manifest.files:
            path.unlink()


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".writing-{path.name}")
    temporary.write_text(text + "\n")
    os.replace(temporary, path)
