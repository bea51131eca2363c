"""The first line of `ane-moe plan`: whether it fits, how fast, which way."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ane_moe.cli import app
from ane_moe.demo import demo_checkpoint
from ane_moe.families.missing import MISSING
from ane_moe.forecast.chips import Range
from ane_moe.forecast.memory_sizes import GIB, Fit, fit
from ane_moe.forecast.outlook import outlook, outlook_of
from ane_moe.forecast.verdict import Verdict
from ane_moe.placement.targets import find_target
from tests.forecast.hub_configs import OLMOE, QWEN3_30B, QWEN3_235B


@pytest.mark.parametrize(
    ("chip", "gib", "least"),
    [
        ("m4-max", 26.9, 36),  # three quarters of 36 are 27
        ("m4-max", 27.1, 48),
        ("m4-max", 96.1, None),
        ("iphone-a17", 3.9, 8),
        ("iphone-a17", 4.1, None),
    ],
)
def test_a_model_takes_its_share_of_the_least_machine_that_holds_it(
    chip: str, gib: float, least: int | None
) -> None:
    found = fit(gib * GIB, find_target(chip))
    assert found.least_gb == least and found.fits is (least is not None)


def test_of_a_chip_whose_machines_nobody_lists_nothing_is_said() -> None:
    found = fit(GIB, find_target("m6"))
    assert found.fits is None and found.least_gb is None


def verdict(memory: Fit, on_engine: bool = True) -> Verdict:
    return Verdict(
        "m4-max", "sparse", "int8", Range(2.6, 4.9, 16.7), "calls", memory, on_engine=on_engine
    )


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (
            verdict(Fit(32 * 10**9, (36, 48, 128), 48)),
            "Fits m4-max with 48 GB or more: up to 32 GB of memory; about 4.9 tok/s (2.6 to 17, "
            "predicted, bound by calls); take --routing sparse (one function per expert) "
            "--compress int8.",
        ),
        (verdict(Fit(10**9, (36, 48), 36)), "Fits m4-max, any that is sold: up to 1 GB"),
        (verdict(Fit(6 * 10**6, (36, 48), 36)), "up to 6 MB of memory"),
        (verdict(Fit(74 * 10**9, (8, 16), None)), "at the least, sold with 8 to 16 GB;"),
        (verdict(Fit(74 * 10**9, (8,), None)), "sold with 8 GB;"),
        (verdict(Fit(10**9, (), None)), "Needs up to 1 GB of memory;"),
        (verdict(Fit(10**9, (36,), 36), on_engine=False), "part of every way would leave"),
    ],
)
def test_the_sentence(found: Verdict, words: str) -> None:
    assert words in found.sentence


def test_what_fits_is_preferred_to_what_is_faster() -> None:
    """Of Qwen3-30B, 31 GB at int8, an M1 (16 GB at most) holds the smaller formats alone."""
    large, small = outlook_of(QWEN3_30B).verdict, outlook_of(QWEN3_30B, target="m1").verdict
    assert large and large.recipe == "int8" and large.memory.least_gb == 48
    assert small and small.recipe in ("small", "tiny") and small.memory.fits


def test_where_nothing_fits_the_smallest_is_what_does_not() -> None:
    found = outlook_of(QWEN3_235B, target="m1")
    assert found.verdict and found.verdict.memory.fits is False
    sizes = [choice.memory.needed_bytes for choice in found.choices]
    assert found.verdict.memory.needed_bytes == min(sizes)
    assert found.verdict.sentence.startswith("Does not fit m1")


def test_where_rules_take_all_off_the_engine_the_default_format_is_named() -> None:
    """The built-in model is so small that formats are equally fast."""
    found = outlook(demo_checkpoint()).verdict
    assert found and not found.on_engine and found.recipe == "int8"


def test_the_answer_comes_first_and_the_next_command_last(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(OLMOE))
    result = CliRunner().invoke(app, ["plan", str(tmp_path), "--target", "m1"])
    lines = result.stdout.splitlines()
    assert lines[0].startswith("Fits m1") and "tok/s" in lines[0] and "--routing" in lines[0]
    assert lines[-1] == (
        f"next: ane-moe convert {tmp_path} OUT --routing sparse --compress small --target m1 "
        "--golden"
    )


def test_a_model_that_convert_refuses_is_refused_first(tmp_path: Path) -> None:
    config = QWEN3_30B | {"model_type": next(iter(MISSING))}
    (tmp_path / "config.json").write_text(json.dumps(config))
    lines = CliRunner().invoke(app, ["plan", str(tmp_path)]).stdout.splitlines()
    assert lines[0].startswith("not supported: ") and not lines[-1].startswith("next:")
    assert outlook_of(config).verdict is None
