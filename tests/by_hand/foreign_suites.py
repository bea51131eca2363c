"""Run other projects' own tests, unmodified, with the reference runtime in the place of Core ML.

    python -m tests.by_hand.foreign_suites coremltools stablehlo-coreml=CHECKOUT

On Linux these suites predict nothing. Here each runs in child processes that have the stand-in for
coremltools' native module (tests/standin), so that every prediction they make and compare is one of
the reference runtime.

coremltools: its tests of MIL ops against NumPy, PyTorch and written-out values. They come inside
its wheel; no checkout is needed. Neural networks, which are not ML Programs, are left out by the
suite's own variable.

stablehlo-coreml: JAX programs converted to Core ML, with JAX as oracle. CHECKOUT is a clone of
github.com/kasper0406/stablehlo-coreml. Its tests/pytorch is left out, since it downloads models.
Beside ane-moe it needs

    pip install "jax>=0.9.1" flax equinox einops flatbuffers absl-py pillow pytest

and that may be in another environment than this one: --python.

Each file of tests is a process of its own, two at a time; one that is killed costs its file only.
Printed per suite: passed n of m, what failed by kind, and the predictions made. --wrong is the
control: every output is replaced by 3 + 2x, so that each test which compares values must fail;
whatever passes compares none.

Exit 0: all passed; 1: a test failed, nothing was predicted, or pytest did not end; 2: bad
arguments.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from tests.standin.install import environment
from tests.standin.script import Script

LONGEST_KIND = 200  # characters of an error message that tell a kind
PYTEST_ENDED = (0, 1, 5)  # pytest's exit codes: all passed, some failed, nothing chosen
WHERE = "from importlib.util import find_spec as f; print(f('{}').submodule_search_locations[0])"


@dataclass(frozen=True)
class Suite:
    folder: str  # of the tests, in the checkout or in the package
    package: str = ""  # an installed package that holds them; "": a checkout does
    left_out: str = ""  # a folder of tests inside `folder`
    variables: dict[str, str] = field(default_factory=dict)


@dataclass
class Result:
    passed: int = 0
    skipped: int = 0  # or expected to fail
    failures: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    predictions: int = 0

    @property
    def failed(self) -> int:
        return sum(map(len, self.failures.values()))

    @property
    def good(self) -> bool:
        return self.predictions > 0 and not self.failures

    def add(self, other: "Result") -> None:
        self.passed += other.passed
        self.skipped += other.skipped
        self.predictions += other.predictions
        for text, tests in other.failures.items():
            self.failures[text] += tests


SUITES = {
    "coremltools": Suite(
        "converters/mil/mil/ops/tests",
        package="coremltools",
        variables={"PYMIL_TEST_TARGETS": "mlprogram"},
    ),
    "stablehlo-coreml": Suite("tests", left_out="pytorch"),
}


def main() -> int:
    options = _parse()
    good = True
    for name, checkout in options.suites:
        started = time.monotonic()
        result = run(name, checkout, options)
        print("\n".join(_rendered(name, result, time.monotonic() - started)), flush=True)
        good = good and result.good
    return 0 if good else 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "suites", nargs="+", metavar="SUITE[=CHECKOUT]", type=_suite, help=f"{' or '.join(SUITES)}"
    )
    parser.add_argument("--workers", type=int, default=2, help="files of tests to run at once")
    parser.add_argument("--python", default=sys.executable, help="the Python to run suites with")
    parser.add_argument("-k", dest="only", default="", help="pytest's -k: tests whose names match")
    parser.add_argument("--wrong", action="store_true", help="make every output wrong; see above")
    parser.add_argument("--xml", type=Path, help="folder for JUnit reports, with tracebacks")
    return parser.parse_args()


def _suite(text: str) -> tuple[str, Path | None]:
    name, _, folder = text.partition("=")
    if name not in SUITES:
        raise argparse.ArgumentTypeError(f"no suite is named {name}; there are {', '.join(SUITES)}")
    if SUITES[name].package:
        if folder:
            raise argparse.ArgumentTypeError(f"{name} is run as it is installed: no checkout")
        return name, None
    if not (folder and Path(folder, SUITES[name].folder).is_dir()):
        raise argparse.ArgumentTypeError(f"no folder of tests: it needs {name}=CHECKOUT")
    return name, Path(folder).resolve()


def run(name: str, checkout: Path | None, options: argparse.Namespace) -> Result:
    """Run one suite, the largest files first; each file's outcome goes to stderr as it ends."""
    suite = SUITES[name]
    root = checkout or _installed(suite.package, options.python)
    files = [
        path
        for path in (root / suite.folder).rglob("test_*.py")
        if suite.left_out not in path.relative_to(root / suite.folder).parts
    ]
    files.sort(key=lambda path: -path.stat().st_size)
    whole = Result()
    with ThreadPoolExecutor(options.workers) as pool:
        for path, part in zip(
            files, pool.map(lambda path: _run_file(path, root, suite, options), files), strict=True
        ):
            place = path.relative_to(root / suite.folder)
            print(f"{place}: passed {part.passed} of {part.passed + part.failed}", file=sys.stderr)
            whole.add(part)
    return whole


def _installed(package: str, python: str) -> Path:
    command = [python, "-c", WHERE.format(package)]
    return Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())


def _run_file(path: Path, root: Path, suite: Suite, options: argparse.Namespace) -> Result:
    """Run one file of tests; nothing is written beside it."""
    label = str(path.relative_to(root / suite.folder).with_suffix("")).replace(os.sep, ".")
    # What a child leaves while it is being ended may come after the clean-up.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as made:
        scratch = Path(made)
        report = (options.xml or scratch).resolve() / f"{label}.xml"
        report.parent.mkdir(parents=True, exist_ok=True)
        report.unlink(missing_ok=True)
        log = scratch / "log"
        script = Script(log=str(log), predict="wrong" if options.wrong else "ok", converts=True)
        (scratch / "tmp").mkdir()
        variables = {
            **os.environ,
            **suite.variables,
            **environment(scratch / "standin", script),
            "TMPDIR": str(scratch / "tmp"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        folder = scratch if suite.package else root
        command = [
            options.python,
            "-m",
            "pytest",
            str(path),
            "-q",
            "-k",
            options.only,
            "--rootdir",
            str(folder),
            "-p",
            "no:cacheprovider",
            "--tb=short",
            "--junitxml",
            str(report),
        ]
        child = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
        if child.returncode not in PYTEST_ENDED or not report.exists():
            said = (child.stderr or child.stdout).strip().splitlines()[-1:]
            reason = f"pytest ended with {child.returncode}: {' '.join(said)}"
            return Result(failures={kind(reason): [label]})
        steps = log.read_text().splitlines() if log.exists() else []
        return read_report(report, sum(step.startswith("predict ") for step in steps))


def read_report(report: Path, predictions: int) -> Result:
    """The outcomes in pytest's JUnit `report`; an expected failure counts as skipped."""
    result = Result(predictions=predictions)
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = {child.tag: child for child in case}
        failure = outcome.get("failure", outcome.get("error"))
        if failure is not None:
            test = f"{case.get('classname')}::{case.get('name')}"
            result.failures[kind(failure.get("message", ""))].append(test)
        elif "skipped" in outcome:
            result.skipped += 1
        else:
            result.passed += 1
    return result


def kind(message: str) -> str:
    """An error message without what differs between two cases of one fault: names, paths, numbers.

    Of a message of NumPy's assert_allclose only the beginning stays, which says what was compared.
    """
    native = re.search(r'NSLocalizedDescription = "(.*)";', message, re.DOTALL)
    text = " ".join((native[1] if native else message).split())
    text = re.split(r" Mismatched elements| ACTUAL: ", text)[0]
    text = re.sub(r"'[^']*'", "'...'", text)
    text = re.sub(r"/\S+", "/...", text)
    text = re.sub(r"-?\b\d+(\.\d+)?(e[+-]?\d+)?%?", "N", text)
    return re.sub(r"N(, N)+", "N, ...", text)[:LONGEST_KIND]


def _rendered(name: str, result: Result, seconds: float) -> Iterator[str]:
    yield (
        f"{name}: passed {result.passed} of {result.passed + result.failed}; "
        f"{result.skipped} skipped by the suite; {result.predictions} predictions; "
        f"{seconds:.0f} s"
    )
    if not result.predictions:
        yield "  nothing was predicted, so nothing was shown"
    for text, tests in sorted(result.failures.items(), key=lambda item: -len(item[1])):
        yield f"  {len(tests):5d}  {text}"
        yield f"         as in {tests[0]}"


if __name__ == "__main__":
    sys.exit(main())
