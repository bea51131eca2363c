"""The functions of a conversion proved by the workers of a cluster. Fed what the golden in the
folder says, the stages of the model do not wait for each other; the whole model, which is a chain,
stays with who asks."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ane_moe.kept import Kept
from ane_moe.manifest import Manifest
from ane_moe.progress import silent
from ane_moe.verification.goldens import read_goldens
from ane_moe.verification.proof import Proof, Row, Trial
from ane_moe.verification.stage import stages

NOTHING_KEPT = Kept(Path("/dev/null"))  # a worker's rows are kept by who asked for them


@dataclass(frozen=True)
class StageCall:
    """One stage of the conversion in `out`, against its goldens by these cosines."""

    out: Path
    manifest: Manifest
    runtime: str
    options: dict[str, Any]
    decode_tokens: int | None
    quick: bool
    cosines: tuple[float, ...]
    number: int

    @property
    def name(self) -> str:
        return f"stage {self.number}"


def rows_of(call: StageCall) -> list[list[Row]]:
    """In a worker: the rows of a stage, against each golden."""
    goldens, _ = read_goldens(call.out, call.manifest, call.quick)
    both = filter(None, (goldens.original, goldens.as_stored))
    trials = [Trial(golden, least, 0) for golden, least in zip(both, call.cosines, strict=True)]
    facts = (call.out, call.manifest, call.runtime, call.options, call.decode_tokens)
    proof = Proof(*facts, NOTHING_KEPT, call.quick, silent)
    return proof.rows(stages(call.manifest)[call.number], trials)


@contextmanager
def by_workers(proof: Proof, trials: Sequence[Trial], pool: Executor) -> Iterator[Proof]:
    """The proof whose stages are begun in the `pool`, the first ones first, but for those that an
    earlier run proved."""
    facts = (proof.out, proof.manifest, proof.runtime, proof.options, proof.decode_tokens)
    cosines = tuple(trial.min_cosine for trial in trials)
    with ThreadPoolExecutor(1) as sender:  # a pool takes no more than it has workers for
        begun: dict[int, Future[Future[list[list[Row]]]]] = {
            number: sender.submit(
                pool.submit, rows_of, StageCall(*facts, proof.quick, cosines, number)
            )
            for number in range(len(stages(proof.manifest)))
            if not proof.is_kept(number)
        }
        try:
            yield replace(proof, begun=begun)
        finally:
            sender.shutdown(wait=True, cancel_futures=True)
