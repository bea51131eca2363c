"""Core ML's own estimates: read from the file that it leaves in the user's cache, and sent on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ane_moe.mlprogram.reader import read_program
from ane_moe.placement.analytics import find_analytics, read_analytics, stretches_of
from ane_moe.placement.estimates import estimate_book
from ane_moe.placement.facts import function_facts
from ane_moe.placement.feedback import COLUMNS, ESTIMATED_BY, FORMAT, feedback
from ane_moe.placement.measured import measure, slow_to_compile
from ane_moe.placement.predicted import predict
from ane_moe.placement.published.graphs import Graph
from ane_moe.placement.targets import find_target
from ane_moe.runtime.coreml import trial as child
from ane_moe.runtime.coreml.modelc_cache import ModelCache
from tests.placement.test_placement import render
from tests.standin.fixtures import standin  # noqa: F401
from tests.standin.packages import single

ROOT = Path(__file__).parents[2]
PLACE = "Library/Caches/python3/com.apple.e5rt.e5bundlecache/26A434/0A1B/0A1B.bundle/H16G.bundle"
# The form of three operations of data/03_compile/opdispatch/ana/ctx/band_part.mil of
# 751K/Apple-Neural-Engine-Microarchitecture-Study-M6 (MIT), shortened.
HEAD = (
    "program(1.3)\n{\n    func main<ios18>(tensor_buffer<fp16> x0) [Launch_ane_ms = fp64(0x1p-3)] {"
)
SUPPORT = (
    'BackendSupport = list<string, 5>(["unsupported", "unsupported", "bnns", "classic_cpu", "{}"])'
)
SHAPE = (1, 128, 128)
PUBLISHED = (
    (
        "a",
        "linear",
        SHAPE,
        (0.0072261680859473714, 0.18605159114664327, 0.21399998330265382),
        "ane",
    ),
    ("b", "relu", SHAPE, (0.00065536000000000001,) * 3, "ane"),
    ("c", "band_part", SHAPE, (None, 0.001077222521825567, 0.001077222521825567), "classic_cpu"),
)


def line(
    name: str, kind: str, shape: tuple[int, ...], ms: tuple[float | None, ...], backend: str
) -> str:
    pairs = zip(("ane", "bnns", "classic_cpu"), ms, strict=True)
    times = ", ".join(f'{{"{key}", {value!r}}}' for key, value in pairs if value is not None)
    support = SUPPORT.format("unsupported" if ms[0] is None else "ane")
    return (
        f"            tensor<fp16, {list(shape)}> {name}_4D45 = {kind}(x = x0)[{support}, "
        f"EstimatedRuntime = dict<string, fp64>({{{times}}}), SelectedBackend = "
        f'string("{backend}"), milId = uint64(1), name = string("{name}")];'
    )


def write(home: Path, rows) -> Path:
    path = home / PLACE / "analytics.mil"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join([HEAD, *(line(*row) for row in rows), "    } -> (c);\n}"]))
    return path


def test_the_file_is_read_to_the_digit(tmp_path):
    found = read_analytics(write(tmp_path, PUBLISHED))
    assert [(op.name, op.type, op.shape, op.ms, op.backend) for op in found] == list(PUBLISHED)
    (stretch,) = stretches_of(found)
    assert (stretch.first, stretch.ops, stretch.verdict) == ("a", 2, "ane")
    margin = PUBLISHED[0][3][1] - PUBLISHED[0][3][0] - 0.25
    assert stretch.margin_ms == pytest.approx((margin, margin))


def test_only_a_file_of_the_same_operations_is_taken(tmp_path):
    path = write(tmp_path, PUBLISHED)
    shapes = dict.fromkeys("abc", SHAPE)
    assert len(find_analytics(shapes, tmp_path)) == 3
    assert not find_analytics({"a": SHAPE, "x": SHAPE}, tmp_path)
    assert not find_analytics(dict.fromkeys("abc", (1, 1, 128)), tmp_path)
    path.write_bytes(b"\xff\xfe no text")
    assert not find_analytics(shapes, tmp_path) and not read_analytics(tmp_path / "no")


@pytest.fixture
def package(tmp_path):
    return single(tmp_path / "one.mlpackage")


@pytest.fixture
def cache(tmp_path, standin, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yield ModelCache(tmp_path / "cache")
    child.stop()


def test_measured_estimates_stand_beside_ours_and_are_sent_on(package, cache, tmp_path):
    program = read_program(package)
    every = function_facts(program, program.default_function).ops
    ops = [op for op in every if op.operation.outputs]
    rows = [
        (op.name, op.operation.type, op.operation.outputs[0].type.shape, (0.1, 0.5, 0.6), "ane")
        for op in ops
    ]
    write(tmp_path / "home", rows)
    report = measure([(package, "one")], cache=cache, numerics=False)
    (row,) = report.functions
    (stretch,) = row.stretches
    assert stretch.margin_ms[0] == pytest.approx(0.4 * len(ops) - 0.25)
    assert f"{stretch.margin_ms[0]:+.3f}" in render(report)
    guess = predict([(package, "one")], find_target("m4", 27))
    document = feedback(guess, report, [(package, "one")])
    assert all(entry["ms"] == (0.1, 0.5, 0.6) for entry in document["estimates"])
    assert {entry["op"] for entry in document["estimates"]} == {op.operation.type for op in ops}
    assert str(tmp_path) not in json.dumps(document)


def test_without_the_file_the_plan_is_all_there_is(package, cache):
    (row,) = measure([(package, "one")], cache=cache, numerics=False).functions
    assert row.ops and not row.stretches and not row.segments


def test_one_run_on_a_mac_fills_a_missing_leaf(tmp_path):
    """An M5's linear: two layers with the rates (200, 40, 35), made into a row that predicts them."""
    entries = []
    for width in (2048, 4096):
        g = Graph(weights="int8")
        program = g.program(g.linear(g.input("x", (1, 1, 2048)), width))
        (op,) = function_facts(program, "main").ops
        work = op.facts["flops"] + width
        kept = {name: op.facts[name] for name in ESTIMATED_BY if name in op.facts}
        kept["dtypes"] = sorted(kept["dtypes"])
        ms = [work / rate / 1e6 for rate in (200, 40, 35)]
        entries.append({"op": "linear", "facts": kept, "ms": ms})
    g = Graph(weights="int8")
    (known,) = function_facts(g.program(g.conv(g.input("x", (1, 64, 1, 1)), 64)), "main").ops
    times = estimate_book(find_target("m5", 27)).candidates(known.facts)[0].times
    kept = {name: known.facts[name] for name in ESTIMATED_BY if name in known.facts}
    kept["dtypes"] = sorted(kept["dtypes"])
    entries.append({"op": "conv", "facts": kept, "ms": times})
    path = tmp_path / "placement-feedback.json"
    rules = {"cost-undecided": dict.fromkeys(COLUMNS, 1)}
    document = {"format": FORMAT, "chip": "m5", "os": "27.0", "functions": [], "rules": rules}
    path.write_text(json.dumps(document | {"estimates": entries}))
    command = [sys.executable, str(ROOT / "scripts" / "refit_placement.py"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("[[leaf]]") == 1 and 'ops = ["linear"]' in done.stdout
    assert "rate = [200, 40, 35]" in done.stdout and 'chips = "h17"' in done.stdout


def test_what_explodes_in_the_compiler_is_warned_of():
    def warned(kernel: int, stride: int, count: int = 1) -> str:
        g = Graph(weights="int8")
        x = g.input("x", (1, 64, 32, 32))
        for _ in range(count):
            weight = g.weight((64, 64, kernel, kernel))
            x = g.op("conv", (1, 64, 32, 32), x=x, weight=weight, strides=[stride, stride])
        return slow_to_compile(function_facts(g.program(x), "main"))

    assert "16 x 16" in warned(16, 1) and not warned(16, 16) and not warned(15, 1)
    assert "387 convolutions" in warned(1, 1, 387) and not warned(1, 1, 386)
