"""What a person, a pipe or a shell meets first: the bare command, help with examples, the page of
commands, completion, silence where it is asked for."""

import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import typer
from packaging.requirements import Requirement

from ane_moe.cli import FIRST_STEPS, _in_front
from ane_moe.commands.table import EXAMPLES
from ane_moe.installation import Package, installation, packages
from scripts.cli_page import PAGE, ROOT, commands, rendered
from tests.test_cli import ane_moe


def test_alone_it_names_three_commands_to_begin_with() -> None:
    result = ane_moe()
    assert result.returncode == 0 and result.stdout == f"{FIRST_STEPS}\n" and not result.stderr
    named = re.findall(r"^  ane-moe (\S+)", result.stdout, re.M)
    assert len(named) == 3 and set(named) <= set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_both_examples_of_a_command_parse_and_end_its_help(name: str) -> None:
    command = commands()[name]
    shown = " ".join(ane_moe(name, "--help").stdout.split())
    assert len(EXAMPLES[name]) == 2
    for call, why in EXAMPLES[name]:
        program, given, *arguments = shlex.split(call)
        assert (program, given) == ("ane-moe", name) and why
        assert call in shown and why in shown
        resilient = any("hf://" in argument for argument in arguments)  # fetches nothing
        command.make_context(name, arguments, resilient_parsing=resilient)


def test_an_example_that_does_not_parse_is_found() -> None:
    with pytest.raises(Exception, match="No such option"):
        commands()["plan"].make_context("plan", ["model", "--chip", "m4"])


def test_the_page_of_commands_is_fresh() -> None:
    assert PAGE.read_text() == rendered(), "run `python scripts/cli_page.py`"


def test_what_holds_for_all_commands_may_stand_behind_them() -> None:
    assert _in_front(["run", "x", "--quiet"]) == ["--quiet", "run", "x"]
    assert _in_front(["redact", "demo", "--", "--quiet"]) == ["redact", "demo", "--", "--quiet"]


def test_quiet_leaves_errors_alone_on_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    def talkative() -> None:
        typer.echo("data")
        typer.echo("talk", err=True)
        print("more talk", file=sys.stderr)

    monkeypatch.setattr(commands()["doctor"].__class__, "invoke", lambda *_: talkative())
    loud, quiet = ane_moe("doctor"), ane_moe("doctor", "--quiet")
    assert loud.stdout == quiet.stdout == "data\n"
    assert "talk" in loud.stderr and quiet.stderr == ""


@pytest.mark.parametrize("arguments", [("run", "nowhere"), ("run", "--nonsense")])
def test_quiet_does_not_hide_what_went_wrong(arguments: tuple[str, ...]) -> None:
    result = ane_moe(*arguments, "--quiet")
    assert result.returncode == 2 and arguments[1] in result.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands(shell: str) -> None:
    known = {"COMP_WORDS": "ane-moe ver", "COMP_CWORD": "1", "_TYPER_COMPLETE_ARGS": "ane-moe ver"}
    env = os.environ | known | {"_ANE_MOE_COMPLETE": f"complete_{shell}"}
    env |= {"_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    run = [sys.executable, "-m", "ane_moe"]
    done = subprocess.run(run, env=env, capture_output=True, text=True, check=False)
    assert "verify" in done.stdout and "convert" not in done.stdout, done


def test_a_pipe_gets_no_colour_and_no_bar() -> None:
    """Even with the terminal's variables in its environment."""
    run = [sys.executable, "-m", "ane_moe", "doctor"]
    env = os.environ | {"TERM": "xterm-256color", "NO_COLOR": "1"}
    done = subprocess.run(run, env=env, capture_output=True, text=True, check=True)
    assert "\x1b" not in done.stdout + done.stderr and not done.stderr


def test_doctor_says_what_is_there_and_what_is_measured() -> None:
    found = json.loads(ane_moe("doctor", "--json").stdout)
    assert found["sound"] is True
    assert found["memory_bytes"] == psutil.virtual_memory().total
    assert found["cores"] == os.cpu_count() >= found["usable_cores"]
    versions = {one["name"]: one["found"] for one in found["packages"]}
    assert versions["torch"] == importlib.metadata.version("torch")
    ways = {one["command"]: one["how"] for one in found["findings"]}
    assert ways["verify"].startswith("measured") and ways["plan --target"] == "predicted"
    assert found["core_ml"] or all(
        how.startswith("predicted") for command, how in ways.items() if command != "verify"
    )


def test_doctor_fails_where_a_package_is_missing_or_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = ["numpy>=99", "no-such-thing>=1", 'rich; extra == "other"', 'x; extra == "dev"']
    found = packages(wanted)
    assert [(one.name, one.fits, one.extra) for one in found] == [
        ("no-such-thing", False, ""),
        ("numpy", False, ""),
        ("rich", True, "other"),
    ]
    for one in (*found[:2], Package("coremltools", ">=9", None, False)):
        assert not replace(installation(), packages=(one,)).sound
    optional = replace(found[0], extra="other")
    assert replace(installation(), packages=(optional,)).sound
    broken = replace(installation(), packages=found)
    monkeypatch.setattr("ane_moe.installation.installation", lambda: broken)
    result = ane_moe("doctor")
    assert result.returncode == 1 and "FAILED" in result.stdout and ">=99" in result.stdout


def test_requirements_are_those_of_the_project() -> None:
    for text in importlib.metadata.requires("ane-moe") or ():
        requirement = Requirement(text)
        known = {one.name for one in installation().packages}
        if "dev" not in text.partition("extra ==")[2]:
            assert requirement.name in known


def test_all_data_of_the_package_goes_into_a_wheel() -> None:
    """Every file that git keeps beside the modules, by the patterns of the build."""
    listed = subprocess.run(
        ["git", "ls-files", "ane_moe"], cwd=ROOT, capture_output=True, text=True
    )
    files = [Path(line) for line in listed.stdout.splitlines() if not line.endswith(".py")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["ane_moe"]
    packed = {file for pattern in patterns for file in (ROOT / "ane_moe").glob(pattern)}
    assert len(files) > 10 and {ROOT / file for file in files} <= packed


def test_every_folder_with_modules_is_a_package() -> None:
    """Or `packages.find` would leave it out of a wheel."""
    folders = {path.parent for path in (ROOT / "ane_moe").rglob("*.py")}
    assert all((folder / "__init__.py").is_file() for folder in folders)
