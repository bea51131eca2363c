"""The command line as a person meets it: exit codes, one clear line, JSON on stdout, talk on
stderr."""

import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

import pytest

from ane_moe.cli import main
from ane_moe.manifest import FILE_NAME
from tests.models import make_model, save_checkpoint

COMMANDS = [
    "plan",
    "convert",
    "verify",
    "generate",
    "redact",
    "unredact",
    "inspect",
    "run",
    "diff",
    "demo",
    "cache",
    "doctor",
]


@dataclass(frozen=True)
class Ended:
    """What a command left: as `subprocess.run` says it."""

    returncode: int
    stdout: str
    stderr: str


def ane_moe(*arguments):
    """The command in this process, which has imported already what takes seconds."""
    with (
        redirect_stdout(io.StringIO()) as out,
        redirect_stderr(io.StringIO()) as err,
        pytest.raises(SystemExit) as ended,
    ):
        main([*map(str, arguments)])
    return Ended(ended.value.code or 0, out.getvalue(), err.getvalue())


def process(*arguments):
    """The command in a process of its own."""
    command = [sys.executable, "-m", "ane_moe", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = make_model("mixtral", num_hidden_layers=1, max_position_embeddings=64)
    return save_checkpoint(model, tmp_path_factory.mktemp("model") / "checkpoint")


@pytest.fixture(scope="module")
def converted(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("conversion") / "out"
    result = process(
        "convert", checkpoint, out, "--golden", "--prefill", 8, "--workers", 1, "--json"
    )
    assert result.returncode == 0, result.stderr
    return out, result


def test_help_names_every_command_and_loads_nothing_heavy():
    heavy = {"torch", "coremltools", "transformers", "numpy", "rich.progress"}
    program = f"import sys, ane_moe.cli; print(sorted({heavy!r} & sys.modules.keys()))"
    assert (
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True
        ).stdout.strip()
        == "[]"
    )
    result = process("--help")
    assert result.returncode == 0
    assert all(command in result.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    result = ane_moe(command, "--help")
    assert result.returncode == 0 and "Usage:" in result.stdout and not result.stderr


@pytest.mark.parametrize("format", ["int4-block32", "lut8-v4"])
def test_convert_refuses_formats_that_take_a_model_off_the_engine_of_a_mac(
    checkpoint, tmp_path, format
):
    asked = ("convert", checkpoint, tmp_path / "out", "--compress", format, "--dry-run")
    refused = ane_moe(*asked, "--target", "m4")
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
    assert format in refused.stderr and "--allow-cpu" in refused.stderr
    assert ane_moe(*asked, "--target", "m4", "--allow-cpu").returncode == 0
    assert ane_moe(*asked).returncode == 0  # no target: warned of, not refused


def test_convert_prints_json_alone_and_none_of_coremltools_warnings(converted):
    out, result = converted
    document = json.loads(result.stdout)
    assert document["golden"] == "golden.safetensors" and (out / FILE_NAME).exists()
    warnings = [one for one in result.stderr.splitlines() if "ane-moe: warning: " in one]
    assert len(document["concerns"]) == len(warnings)  # of functions that are too small
    assert {one["rule"] for one in document["concerns"]} == {"cost-small"}
    assert "libcoremlpython" not in result.stderr and "Torch version" not in result.stderr


def test_convert_warns_of_what_a_chip_is_known_for(checkpoint, tmp_path):
    result = ane_moe(
        *("convert", checkpoint, tmp_path / "out", "--target", "m5-max", "--dry-run", "--json")
    )
    rules = {concern["rule"] for concern in json.loads(result.stdout)["concerns"]}
    assert {"stateful-m5", "state-access"} <= rules
    assert all(f"({rule})" in result.stderr for rule in rules)


def test_verify_passes_a_true_conversion(converted):
    result = ane_moe("verify", converted[0], "--json")
    document = json.loads(result.stdout)
    assert result.returncode == 0 and document["passed"] is True
    assert {"shards", "routing", "model", "runtime"} <= document.keys()


def test_a_failed_gate_exits_with_1(converted):
    result = ane_moe("verify", converted[0], "--min-cosine", "1", "--json")
    assert result.returncode == 1 and json.loads(result.stdout)["passed"] is False


def test_generate_takes_ids_and_returns_new_ones(converted):
    result = ane_moe("generate", converted[0], "--prompt-ids", "3,4,5", "--max-tokens", 4, "--json")
    document = json.loads(result.stdout)
    assert (
        result.returncode == 0
        and document["prompt_ids"] == [3, 4, 5]
        and 1 <= len(document["ids"]) <= 4
    )


def test_inspect_shows_the_functions_of_a_shard(converted):
    result = ane_moe("inspect", converted[0] / "attn/layer_00.mlpackage")
    assert result.returncode == 0 and "decode" in result.stdout and "prefill" in result.stdout


def test_the_plan_reads_no_weights(checkpoint, tmp_path):
    result = ane_moe("convert", checkpoint, tmp_path / "out", "--dry-run", "--json")
    document = json.loads(result.stdout)
    assert [shard["kind"] for shard in document["shards"]] == ["attn", "moe", "lm_head", "lm_head"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["convert", "no/such/model", "out"], "OWNER/NAME on the Hub"),
        (["convert", "{checkpoint}", "{checkpoint}"], "holds something else"),
        (["convert", "{checkpoint}", "out", "--context", "65"], "the model's own is 64"),
        (["convert", "{checkpoint}", "out", "--layers", "7"], "its layers are 0-0"),
        (["verify", "{checkpoint}"], "not a finished conversion"),
        (["verify", "nowhere"], "nowhere"),
        (["generate", "{out}", "--prompt-ids", "3,999"], "999"),
        (["generate", "{out}", "--prompt", "x"], "tokenizer"),
        (["inspect", "nowhere.mlpackage"], "no such package"),
        (["run", "{out}/attn/layer_00.mlpackage", "--function", "nonsense"], "nonsense"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_2(
    arguments, words, checkpoint, converted, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    result = ane_moe(*(text.format(checkpoint=checkpoint, out=converted[0]) for text in arguments))
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2
    assert len(lines) == 1 and lines[0].startswith("ane-moe: ") and words in lines[0]
    assert not (tmp_path / "out").exists()


def test_wrong_usage_exits_with_2():
    assert ane_moe("convert").returncode == 2
    assert process("nonsense").returncode == 2
    assert ane_moe("convert", "a", "b", "--routing", "sideways").returncode == 2


def test_debug_shows_where_an_error_comes_from():
    result = process("--debug", "inspect", "nowhere.mlpackage")
    assert "Traceback" in result.stderr
