"""Run other projects' own tests, unmodified, with the reference runtime in the place of Core ML.

    python scripts/foreign_suites.py coremltools stablehlo-coreml=CHECKOUT

On Linux these suites predict nothing. Here each runs in child processes that have the stand-in for
coremltools' native module (tests/standin), so that every prediction they make and compare is one of
the reference runtime.

coremltools: its tests of MIL ops against NumPy, PyTorch and written-out values. They come inside
its wheel; no checkout is needed. Neural networks, which are not ML Programs, are left out by the
suite's own variable.

stablehlo-coreml: JAX programs converted to Core ML, with JAX as oracle. CHECKOUT is a clone of
github.com/kasper0406/stablehlo-coreml. Its tests/pytorch is left out, since it downloads models.
Beside ane-moe it needs

    pip install "jax>=0.9.1" flax equinox einops flatbuffers absl-py pillow pytest pytest-xdist

and that may be in another environment than this one: --python.

Printed per suite: passed n of m, what failed by kind, and the predictions made. --wrong is the
control: every output is replaced by 3 + 2x, so that each test which compares values must fail;
whatever passes compares none.

Exit 0: all passed; 1: a test failed, nothing was predicted, or pytest could not run; 2: bad
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
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.standin.install import environment  # noqa: E402
from tests.standin.script import Script  # noqa: E402

LONGEST_KIND = 200                  # characters of an error message that tell a kind
PYTEST_RAN = (0, 1)                 # pytest's exit codes when all tests ran: passed, some failed


@dataclass(frozen=True)
class Suite:
    arguments: tuple[str, ...]      # pytest's
    needs_checkout: bool
    variables: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    passed: int
    skipped: int
    failures: dict[str, list[str]]  # kind -> names of tests
    predictions: int
    seconds: float

    @property
    def failed(self) -> int:
        return sum(map(len, self.failures.values()))

    @property
    def good(self) -> bool:
        return self.predictions > 0 and not self.failures


SUITES = {
    "coremltools": Suite(("--pyargs", "coremltools.converters.mil.mil.ops.tests"), False,
                         {"PYMIL_TEST_TARGETS": "mlprogram"}),
    "stablehlo-coreml": Suite(("tests", "--ignore", "tests/pytorch"), True),
}


def main() -> int:
    options = _parse()
    good = True
    for name, checkout in options.suites:
        with tempfile.TemporaryDirectory() as scratch:
            result = run(name, checkout, options, Path(scratch))
        print("\n".join(_rendered(name, result)), flush=True)
        good = good and result.good
    return 0 if good else 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suites", nargs="+", metavar="SUITE[=CHECKOUT]", type=_suite,
                        help=f"{' or '.join(SUITES)}")
    parser.add_argument("--workers", type=int, default=2, help="processes that share the tests")
    parser.add_argument("--python", default=sys.executable, help="the Python to run suites with")
    parser.add_argument("-k", dest="only", default="", help="pytest's -k: tests whose names match")
    parser.add_argument("--wrong", action="store_true", help="make every output wrong; see above")
    parser.add_argument("--xml", type=Path, help="folder for JUnit reports, with tracebacks")
    return parser.parse_args()


def _suite(text: str) -> tuple[str, Path | None]:
    name, _, folder = text.partition("=")
    if name not in SUITES:
        raise argparse.ArgumentTypeError(f"no suite is named {name}; there are {', '.join(SUITES)}")
    if SUITES[name].needs_checkout and not (folder and Path(folder, "tests").is_dir()):
        raise argparse.ArgumentTypeError(f"no folder tests: it takes a checkout, {name}=CHECKOUT")
    if folder and not SUITES[name].needs_checkout:
        raise argparse.ArgumentTypeError(f"{name} is run as it is installed, without a checkout")
    return name, Path(folder).resolve() if folder else None


def run(name: str, checkout: Path | None, options: argparse.Namespace, scratch: Path) -> Result:
    """Run one suite, with its progress on stderr; all that it writes goes to `scratch`."""
    suite = SUITES[name]
    report = (options.xml or scratch).resolve() / f"{name}.xml"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    log = scratch / "log"
    script = Script(log=str(log), predict="wrong" if options.wrong else "ok")
    (scratch / "tmp").mkdir()
    variables = {**os.environ, **suite.variables, **environment(scratch / "standin", script),
                 "TMPDIR": str(scratch / "tmp"), "PYTHONDONTWRITEBYTECODE": "1"}
    folder = checkout or scratch
    command = [options.python, "-m", "pytest", "-q", "-n", str(options.workers), "--no-summary",
               "--tb=short", "--junitxml", str(report), "-p", "no:cacheprovider",
               "--rootdir", str(folder), "-k", options.only, *suite.arguments]
    started = time.monotonic()
    child = subprocess.run(command, cwd=folder, env=variables, stdout=sys.stderr)
    if child.returncode not in PYTEST_RAN or not report.exists():
        sys.exit(f"{name}: pytest ended with {child.returncode}; it said why above")
    steps = log.read_text().splitlines() if log.exists() else []
    predictions = sum(step.startswith("predict ") for step in steps)
    return read_report(report, predictions, time.monotonic() - started)


def read_report(report: Path, predictions: int, seconds: float) -> Result:
    """The outcomes in pytest's JUnit `report`; an expected failure counts as skipped."""
    passed = skipped = 0
    failures: dict[str, list[str]] = defaultdict(list)
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = {child.tag: child for child in case}
        failure = outcome.get("failure", outcome.get("error"))
        if failure is not None:
            test = f"{case.get('classname')}::{case.get('name')}"
            failures[kind(failure.get("message", ""))].append(test)
        elif "skipped" in outcome:
            skipped += 1
        else:
            passed += 1
    return Result(passed, skipped, dict(failures), predictions, seconds)


def kind(message: str) -> str:
    """An error message without what differs between two cases of one fault: names and numbers.

    Of a message of NumPy's assert_allclose only the beginning stays, which says what was compared.
    """
    native = re.search(r'NSLocalizedDescription = "(.*)";', message, re.DOTALL)
    text = " ".join((native[1] if native else message).split())
    text = re.split(r" Mismatched elements| ACTUAL: ", text)[0]
    text = re.sub(r"'[^']*'", "'...'", text)
    text = re.sub(r"-?\b\d+(\.\d+)?(e[+-]?\d+)?%?", "N", text)
    return re.sub(r"N(, N)+", "N, ...", text)[:LONGEST_KIND]


def _rendered(name: str, result: Result) -> Iterator[str]:
    yield (f"{name}: passed {result.passed} of {result.passed + result.failed}; "
           f"{result.skipped} skipped by the suite; {result.predictions} predictions; "
           f"{result.seconds:.0f} s")
    if not result.predictions:
        yield "  nothing was predicted, so nothing was shown"
    for text, tests in sorted(result.failures.items(), key=lambda item: -len(item[1])):
        yield f"  {len(tests):5d}  {text}"
        yield f"         as in {tests[0]}"


if __name__ == "__main__":
    sys.exit(main())
