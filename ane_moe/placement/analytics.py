"""What Core ML's segmenter wrote down when it placed a model: its estimates for each operation.

It leaves an `analytics.mil` in the user's cache for every model that is loaded:

    ~/Library/Caches/PROCESS/com.apple.e5rt.e5bundlecache/BUILD/HASH/HASH.bundle/H16G.bundle/

The format is no public one: a file that does not read as expected is taken as not there. Described
by 751K/Apple-Neural-Engine-Microarchitecture-Study-M6, notes/coreml_dispatch.md.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ane_moe.placement.dispatch import Choice, dispatch
from ane_moe.placement.estimates import Estimate, RunCost
from ane_moe.placement.result import Stretch

CACHES = Path("Library/Caches")
PATTERN = "*/com.apple.e5rt.e5bundlecache/*/*/*.bundle/*.bundle/analytics.mil"
MAX_BYTES = 64 << 20
SAME = 0.9  # share of a file's operations that a function has to have, for the file to be of it
BACKENDS = ("ane", "bnns", "classic_cpu")
Shape = tuple[int | None, ...]
RUN = RunCost(0.25, 0.25, 0.125)

_TYPE = re.compile(r" = (\w+)(?:<\w+>)?\(")
_SHAPE = re.compile(r"tensor<\w+, \[([\d, ]+)\]>")
_TIMES = re.compile(r"EstimatedRuntime = dict<string, fp64>\(\{([^)]*)\}\)")
_TIME = re.compile(r'\{"(\w+)", ([^}]+)\}')
_SELECTED = re.compile(r'SelectedBackend = string\("(\w+)"\)')
_NAME = re.compile(r'[,\[] ?name = string\("([^"]*)"\)')


@dataclass(frozen=True)
class Segmented:
    """One operation, by the name of its first output: milliseconds on engine, bnns and classic CPU
    (None: not supported there), and which was taken."""

    name: str
    type: str
    shape: Shape
    ms: tuple[float | None, ...]
    backend: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def read_analytics(path: Path) -> tuple[Segmented, ...]:
    """The operations of a file, in order; none where it is not of the known form."""
    try:
        if path.stat().st_size > MAX_BYTES:
            return ()
        return tuple(_operations(path.read_text()))
    except (OSError, ValueError):
        return ()


def find_analytics(shapes: Mapping[str, Shape], home: Path) -> tuple[Segmented, ...]:
    """What the newest file says whose operations, by name and shape of their first output, are
    those of a function; none where there is no such file. How Core ML names the folder is not
    known."""
    files = sorted((home / CACHES).glob(PATTERN), key=lambda path: -path.stat().st_mtime)
    for path in files:
        found = read_analytics(path)
        alike = sum(shapes.get(op.name) == op.shape for op in found)
        if found and alike >= SAME * len(found):
            return found
    return ()


def stretches_of(ops: Sequence[Segmented]) -> tuple[Stretch, ...]:
    """The stretches that the engine could run, with Core ML's own estimates and what it took."""
    choices = [Choice(op.ms[0] is not None, (_estimate(op),)) for op in ops]
    shown = []
    for stretch in dispatch(choices, RUN).stretches:
        members = ops[stretch.start : stretch.stop]
        verdict = "ane" if any(op.backend == "ane" for op in members) else "cpu"
        figures = (stretch.ane_ms, stretch.cpu_ms, stretch.margin_ms)
        shown.append(Stretch(members[0].name, len(members), verdict, *figures, ""))
    return tuple(shown)


def segmented(record: dict[str, Any]) -> Segmented:
    """One operation as a child process hands it on."""
    lists = {key: tuple(record[key]) for key in ("shape", "ms")}
    return Segmented(**{**record, **lists})


def _estimate(op: Segmented) -> Estimate:
    known = [ms for ms in op.ms if ms is not None]
    ane, bnns, classic = (max(known, default=0.0) if ms is None else ms for ms in op.ms)
    return Estimate(ane, bnns, classic)


def _operations(text: str) -> Iterator[Segmented]:
    for line in text.splitlines():
        kind, times, shape = (found.search(line) for found in (_TYPE, _TIMES, _SHAPE))
        name, selected = _NAME.search(line), _SELECTED.search(line)
        if kind and times and name and selected and shape:
            found = {backend: _number(ms) for backend, ms in _TIME.findall(times[1])}
            ms = tuple(found.get(backend) for backend in BACKENDS)
            sizes = tuple(map(int, shape[1].split(",")))
            yield Segmented(name[1], kind[1], sizes, ms, selected[1])


def _number(text: str) -> float:
    return float.fromhex(text) if "0x" in text else float(text)
