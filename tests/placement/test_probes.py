"""One command on a Mac, one small file, the rows that a chip lacks: over the stand-in, end to end."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ane_moe.cli import main
from ane_moe.mlprogram.reader import read_program
from ane_moe.placement import check
from ane_moe.placement.estimates import estimate_book, load_estimates
from ane_moe.placement.facts import function_facts
from ane_moe.placement.feedback import FILE_NAME
from ane_moe.placement.machine import Machine
from ane_moe.placement.probes import write_probes
from ane_moe.placement.targets import find_target
from ane_moe.runtime.coreml import trial as child
from tests.placement.test_analytics import PLACE, ROOT, line
from tests.standin.fixtures import standin  # noqa: F401

# An M5 as it might be: one rate for each kind of operation, which nobody has read.
ANE, BNNS, CLASSIC = 200, 40, 35


@pytest.fixture(scope="module")
def probes(tmp_path_factory):
    return write_probes(tmp_path_factory.mktemp("probes"))


def operations(probes):
    for path, _ in probes:
        program = read_program(path)
        yield path, function_facts(program, program.default_function).ops


def test_probes_hold_every_kind_that_an_m5_is_not_known_for(probes):
    """Every kind of a leaf but those that no graph of ours has."""
    probed = {op.operation.type for _, ops in operations(probes) for op in ops}
    leaves = {kind for row in load_estimates()["leaf"] for kind in row["ops"]}
    assert leaves <= probed
    assert sum(path.stat().st_size for folder, _ in probes for path in folder.rglob("*.bin")) < 1e8


def test_probes_fall_into_every_leaf_of_a_chip_that_is_known(probes):
    book = estimate_book(find_target("m4", 27))
    for kind, leaves in (("conv", 3), ("linear", 4)):
        ops = [op for _, ops in operations(probes) for op in ops if op.operation.type == kind]
        rates = {
            round(book.measures(op.facts)[0] / book.candidates(op.facts)[0].ane_ms / 1e6)
            for op in ops
        }
        assert len(rates) >= leaves, kind


def leave_analytics(home: Path, probes) -> None:
    """What Core ML would leave of each package."""
    book = estimate_book(find_target("m5", 27))
    for number, (_, ops) in enumerate(operations(probes)):
        rows = []
        for op in ops:
            work, _ = book.measures(op.facts)
            shape = op.operation.outputs[0].type.shape
            ms = tuple(work / rate / 1e6 for rate in (ANE, BNNS, CLASSIC))
            rows.append(line(op.name, op.operation.type, shape, ms, "ane"))
        path = home / PLACE.replace("0A1B/", f"0A{number}B/", 1) / "analytics.mil"
        path.parent.mkdir(parents=True)
        path.write_text("\n".join(["program(1.3)", "{", *rows, "}"]))


def probe(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["probe", *map(str, arguments)])
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err


def test_one_command_gives_one_file_that_fills_the_leaves_of_an_m5(
    probes, standin, tmp_path, monkeypatch, capsys
):
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("ANE_MOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(check, "this_machine", lambda: Machine("m5", "27.0.1"))
    monkeypatch.setattr("ane_moe.placement.measured.this_machine", lambda: Machine("m5", "27.0.1"))
    leave_analytics(home, probes)
    code, text, _ = probe(capsys, tmp_path)
    child.stop()
    path = tmp_path / FILE_NAME
    assert code == 0 and str(path) in text and path.stat().st_size < 100_000
    document = json.loads(path.read_text())
    assert (document["chip"], document["os"]) == ("m5", "27.0.1") and document["estimates"]
    assert str(tmp_path) not in path.read_text() and ".mlpackage" not in path.read_text()

    command = [sys.executable, str(ROOT / "scripts" / "refit_placement.py"), str(path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = tomllib.loads(printed[printed.index("[[leaf]]") :])["leaf"]
    kinds = {kind for row in rows for kind in row["ops"]}
    assert {"linear", "add", "mul", "concat", "transpose", "gather", "conv"} <= kinds
    assert {(row["chips"], row["os"]) for row in rows} == {("h17", "27")}
    linear = [row["rate"] for row in rows if row["ops"] == ["linear"]]
    assert linear == [[ANE, BNNS, CLASSIC]]


def test_off_a_mac_there_is_nothing_to_probe(tmp_path, capsys):
    code, _, error = probe(capsys, tmp_path)
    assert code == 2 and "macOS" in error and not list(tmp_path.iterdir())
