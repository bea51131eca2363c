"""The functions of a conversion proved by the workers of a cluster. Fed what a golden says, the
stages of the model do not wait for each other; the whole model, which is a chain, stays with who
asks."""

import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ane_moe.errors import UserError
from ane_moe.files import TEMPORARY, scratch_folder, sha256, temporary_folder
from ane_moe.hub.fetched import address_of
from ane_moe.kept import Kept
from ane_moe.manifest import Manifest, Shard
from ane_moe.model.port import GUESS
from ane_moe.original.golden import read_golden, write_golden
from ane_moe.original.stored_model import Goldens
from ane_moe.progress import silent
from ane_moe.remote_folder import RemoteFolder, SentFile, at_hand
from ane_moe.verification.goldens import prepared
from ane_moe.verification.proof import Proof, Row, Trial, of_stage
from ane_moe.verification.stage import Stage, stages

NOTHING_KEPT = Kept(Path("/dev/null"))  # a worker's rows are kept by who asked for them
File = Path | SentFile


@dataclass(frozen=True)
class GoldenFiles:
    """Where workers find goldens: the original's and, where there is one, that of the weights as
    they are stored. Those that were `captured` for this proof are as it wants them."""

    files: tuple[File, ...]
    captured: bool

    @contextmanager
    def opened(self, call: "StageCall") -> Iterator[list[Any]]:
        """In a worker: the goldens, whose layers are read as they are asked for. Raises
        UserError."""
        with ExitStack() as stack:
            found = [read_golden(stack.enter_context(at_hand(file))) for file in self.files]
            if not self.captured:
                goldens, where = Goldens(found[0], (*found, None)[1], {}), Path(str(call.out))
                both = prepared(goldens, call.manifest, call.quick, where)
                found = [one for one in (both.original, both.as_stored) if one]
            yield found


@dataclass(frozen=True)
class StageCall:
    """One stage of the conversion in `out`, against its goldens by these cosines."""

    out: Path | RemoteFolder
    manifest: Manifest
    runtime: str
    options: dict[str, Any]
    decode_tokens: int | None
    quick: bool
    cosines: tuple[float, ...]
    goldens: GoldenFiles
    number: int

    @property
    def name(self) -> str:
        return f"stage {self.number}"

    @property
    def stage(self) -> Stage:
        return stages(self.manifest)[self.number]


def rows_of(call: StageCall) -> list[list[Row]]:
    """In a worker: the rows of a stage, against each golden."""
    with call.goldens.opened(call) as goldens, _at_hand(call) as out:
        both = zip(goldens, call.cosines, strict=True)
        trials = [Trial(golden, least, 0) for golden, least in both]
        facts = (out, call.manifest, call.runtime, call.options, call.decode_tokens)
        return Proof(*facts, NOTHING_KEPT, call.quick, silent).rows(call.stage, trials)


@contextmanager
def _at_hand(call: StageCall) -> Iterator[Path]:
    """A folder with what the stage is made of."""
    if isinstance(call.out, Path):
        yield call.out
        return
    places, files = [f"{path}/" for path in _needed(call)], call.manifest.files
    with temporary_folder() as scratch:
        mine = {n: d for n, d in files.items() if any(map(f"{n}/".startswith, places))}
        call.out.fetch_checked(mine, scratch)
        yield scratch


def _needed(call: StageCall) -> set[str]:
    """The paths of a stage's shards, and of what those that guess experts are compared with."""
    shards, manifest = _shards(call), call.manifest
    functions = (function for shard in shards for function in shard.functions)
    roots = {port.root for function in functions for port in function.ports.outputs}
    needed = {shard.path for shard in shards}
    if GUESS in roots:
        needed |= {str(one["router"]) for one in manifest.moe.values() if "router" in one}
        needed |= {manifest.early} if manifest.early else set()
    return needed


def _shards(call: StageCall) -> list[Shard]:
    """The shards of a stage, with what computes its experts."""
    own = [step for step in call.stage if isinstance(step, Shard)]
    if not any(isinstance(step, int) for step in call.stage):
        return own
    seen = of_stage(call.manifest, call.stage).shards
    return own + [shard for shard in seen if shard.dispatched]


@contextmanager
def shared_goldens(
    out: Path, manifest: Manifest, goldens: Goldens, captured: bool
) -> Iterator[tuple[Path | RemoteFolder, GoldenFiles]]:
    """Where workers find the conversion in `out`, and the goldens: those that lie there, or, where
    they were `captured`, beside it for the length of the block. Raises UserError."""
    away = address_of(out)
    both = [golden for golden in (goldens.original, goldens.as_stored) if golden]
    if not captured:
        names = [name for name in (manifest.golden, manifest.golden_as_stored) if name]
        found = [SentFile(away, n, manifest.files[n]) if away else out / n for n in names]
        yield away or out, GoldenFiles(tuple(found), captured)
        return
    with _writable(out) as scratch:
        paths = [scratch / f"{number}.safetensors" for number, _ in enumerate(both)]
        for path, golden in zip(paths, both, strict=True):
            write_golden(golden, path)
        if away is None:
            yield out, GoldenFiles(tuple(paths), captured)
            return
        below = f"{TEMPORARY}golden-{uuid.uuid4().hex}"
        sent = [SentFile(away, f"{below}/{path.name}", sha256(path)) for path in paths]
        try:
            for path, file in zip(paths, sent, strict=True):
                away.send(path, file.name)
            yield away, GoldenFiles(tuple(sent), captured)
        finally:
            for file in sent:
                away.remove(file.name)


@contextmanager
def _writable(out: Path) -> Iterator[Path]:
    try:
        with scratch_folder(out, "golden") as scratch:
            yield scratch
    except OSError as error:
        found = f"{out} cannot be written ({error.strerror})"
        raise UserError("workers find a golden beside the conversion", found) from None


@contextmanager
def by_workers(
    proof: Proof,
    trials: Sequence[Trial],
    pool: Executor,
    where: Path | RemoteFolder,
    goldens: GoldenFiles,
) -> Iterator[Proof]:
    """The proof whose stages are begun in the `pool`, the first ones first, but for those that an
    earlier run proved."""
    facts = (where, proof.manifest, proof.runtime, proof.options, proof.decode_tokens)
    cosines = tuple(trial.min_cosine for trial in trials)
    with ThreadPoolExecutor(1) as sender:  # a pool takes no more than it has workers for
        begun: dict[int, Future[Future[list[list[Row]]]]] = {
            number: sender.submit(
                pool.submit, rows_of, StageCall(*facts, proof.quick, cosines, goldens, number)
            )
            for number in range(len(stages(proof.manifest)))
            if not proof.is_kept(number)
        }
        try:
            yield replace(proof, begun=begun)
        except BaseException:
            sender.shutdown(wait=False, cancel_futures=True)
            pool.shutdown(wait=False, cancel_futures=True)  # which waits with a call for room
            raise
