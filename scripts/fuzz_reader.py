"""Fuzz the package reader and the reference runtime: python scripts/fuzz_reader.py --minutes 10

Damages small packages at random places (tests/runtime/mutations.py), then reads, summarizes, prints
and runs them in a child process. Only UserError may come out. A crash of the child, another
exception, a case that takes longer than
--seconds or grows the child by more than --megabytes is a finding: it is printed with the number
that repeats it.
"""

import argparse
import faulthandler
import json
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "runtime")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument(
        "--cases", type=int, default=None, help="stop after so many cases (1 repeats --seed alone)"
    )
    parser.add_argument(
        "--read-only", action="store_true", help="do not run the packages that are still sound"
    )
    parser.add_argument("--seconds", type=float, default=20, help="longest a case may take")
    parser.add_argument("--megabytes", type=int, default=400, help="most the child may grow")
    parser.add_argument(
        "--packages", type=Path, help="folder for the undamaged packages; kept, and used again"
    )
    parser.add_argument("--child", nargs=2, metavar=("PACKAGES", "SCRATCH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _child(arguments, *map(Path, arguments.child))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        packages = arguments.packages or Path(scratch) / "packages"
        _build(packages)
        return _watch(arguments, packages, Path(scratch))


def _build(packages: Path) -> None:
    from conftest import build
    from mutations import SEEDS

    packages.mkdir(parents=True, exist_ok=True)
    for name in SEEDS:
        build(name, packages)


def _watch(arguments: argparse.Namespace, packages: Path, scratch: Path) -> int:
    """Keep a child going until the time is over; start a new one after the case that ended it."""
    end = time.monotonic() + 60 * arguments.minutes
    first, last = (
        arguments.seed,
        None if arguments.cases is None else arguments.seed + arguments.cases,
    )
    findings = refused = 0
    case = first
    while time.monotonic() < end and (last is None or case < last):
        command = [
            sys.executable,
            __file__,
            "--child",
            str(packages),
            str(scratch),
            "--seed",
            str(case),
            "--minutes",
            str((end - time.monotonic()) / 60),
            "--seconds",
            str(arguments.seconds),
            "--megabytes",
            str(arguments.megabytes),
        ]
        command += ["--cases", str(last - case)] if last is not None else []
        command += ["--read-only"] if arguments.read_only else []
        child = subprocess.run(command, capture_output=True, text=True)
        state = json.loads((scratch / "state.json").read_text())
        refused += state["refused"]
        case = state["case"] + 1
        if child.returncode != 0:
            findings += 1
            print(
                f"case {state['case']} ({state['name']}) ended the child with {child.returncode}:"
            )
            print(child.stderr[-4000:], flush=True)
    print(f"{case - first} cases, {refused} refused with one clear error, {findings} findings")
    return 1 if findings else 0


def _child(arguments: argparse.Namespace, packages: Path, scratch: Path) -> None:
    import torch
    from conftest import build
    from mutations import SEEDS, damaged_copy, exercise

    torch.set_num_threads(1)
    for name in SEEDS:  # what imports and caches take is not growth
        exercise(build(name, packages), execute=not arguments.read_only)
    limit_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + arguments.megabytes * 1024
    end = time.monotonic() + 60 * arguments.minutes
    case, refused = arguments.seed, 0
    last = None if arguments.cases is None else case + arguments.cases
    state = scratch / "state.json"
    while time.monotonic() < end and (last is None or case < last):
        random = Random(case)
        name = random.choice(SEEDS)
        state.write_text(json.dumps({"case": case, "name": name, "refused": refused}))
        faulthandler.dump_traceback_later(arguments.seconds, exit=True)
        try:
            target = damaged_copy(build(name, packages), scratch / "damaged.mlpackage", random)
            refused += not exercise(target, execute=not arguments.read_only)
        except Exception:
            traceback.print_exc()
            sys.exit(2)
        faulthandler.cancel_dump_traceback_later()
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > limit_kb:
            sys.exit(f"the process grew by more than {arguments.megabytes} MB")
        case += 1
    state.write_text(json.dumps({"case": case - 1, "name": "", "refused": refused}))


if __name__ == "__main__":
    sys.exit(main())
