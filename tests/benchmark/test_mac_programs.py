"""What macOS's own programs and mlx-lm tell, by programs that pretend to be them."""

import plistlib
import sys
import textwrap
from io import StringIO

import pytest
from rich.console import Console

from ane_moe.benchmark.energy import NotPermitted, mean_power, measure_energy, require_powermetrics
from ane_moe.benchmark.measurement import BenchOptions, bench
from ane_moe.benchmark.result import Side
from ane_moe.benchmark.surroundings import low_power_mode, power_source, thermal_state
from ane_moe.benchmark.versus_mlx import run_mlx
from ane_moe.errors import UserError
from ane_moe.manifest import read_manifest
from ane_moe.report.bench_table import bench_report
from tests.models import edit_config

OURS = Side("ane-moe", "fp16", 100.0, 10.0, 4, 1000, 3)


def sample(cpu, gpu, ane, milliseconds=500, **more):
    """One of powermetrics' property lists: energies in mJ, fields as asitop reads them."""
    return {
        "elapsed_ns": milliseconds * 1_000_000,
        "thermal_pressure": "Nominal",
        "processor": {"cpu_energy": cpu, "gpu_energy": gpu, "ane_energy": ane},
    } | more


def written(samples):
    return b"\0".join(plistlib.dumps(one) for one in samples) + b"\0"


# -- energy
# --------------------------------------------------------------------------------------------------


def test_mean_power_is_energy_over_time_without_the_first_sample():
    found = mean_power(
        written([sample(9e6, 9e6, 9e6), sample(500, 50, 1000), sample(250, 50, 500, 250)])
    )
    assert (found.cpu_mw, found.gpu_mw, found.ane_mw) == pytest.approx((1000, 400 / 3, 2000))
    assert (found.seconds, found.thermal_pressure) == (0.75, "Nominal")


@pytest.mark.parametrize(
    "samples",
    [
        b"",
        b"\0",
        b"<plist",
        written([{"elapsed_ns": 5}]),
        written([sample(1, 1, 1, elapsed_ns=0)]),
        written([sample(1, 1, 1, processor={"package_joules": 1})]),
    ],
)
def test_samples_without_power_are_named(samples):
    with pytest.raises(NotPermitted, match="no power"):
        mean_power(samples)


def fake_powermetrics(program, tmp_path):
    (tmp_path / "idle").write_bytes(written([sample(50, 0, 0)] * 3))
    (tmp_path / "busy").write_bytes(written([sample(100, 0, 150)] * 3))
    program("sudo", 'test "$1" = -n || exit 9; shift; exec "$@"')
    program(
        "powermetrics",
        f"""while [ "$1" != -o ]; do test "$1" = -n && count=$2; shift; done
        if [ "$count" = 20 ]; then sleep 0.3; cp {tmp_path}/busy "$2"; else cp {tmp_path}/idle "$2"; fi""",
    )


def test_energy_per_token_is_power_times_time_and_idle_is_taken_off(program, tmp_path):
    fake_powermetrics(program, tmp_path)
    require_powermetrics()
    calls = []
    found = measure_energy(lambda: calls.append(None))
    assert found.tokens == len(calls) > 0
    assert (found.idle.total_mw, found.decoding.total_mw) == (100, 500)
    assert found.mj_per_token_above_idle == pytest.approx(found.mj_per_token * 400 / 500)
    assert found.mj_per_token * found.tokens >= 500 * 0.3
    assert "estimates" in found.limits


def test_without_the_right_to_run_it_the_report_says_so_and_has_the_rest(program, small):
    program("sudo", "echo 'sudo: a password is required' >&2; exit 1")
    program("powermetrics", "exit 1")
    report = bench(
        small,
        BenchOptions(runs=1, tokens=1, fills=(0,), lengths=(1,), energy=True),
        runtime="reference",
    )
    assert (
        report.energy is None
        and "a password is required" in report.energy_skipped
        and report.decode
    )


def test_an_error_while_decoding_ends_the_meter(program, tmp_path):
    fake_powermetrics(program, tmp_path)
    with pytest.raises(ZeroDivisionError):
        measure_energy(lambda: 1 // 0)


def test_no_powermetrics_is_a_users_error(program):
    with pytest.raises(UserError, match="powermetrics"):
        require_powermetrics()


# -- power and heat
# -----------------------------------------------------------------------------------------------


def test_power_source_low_power_mode_and_heat_are_read_from_pmset(program):
    program(
        "pmset",
        r"""case "$*" in
        "-g batt") echo "Now drawing from 'Battery Power'"; echo " -InternalBattery-0 (id=1)	87%; discharging" ;;
        "-g") printf 'System-wide power settings:\n lowpowermode         1\n sleep 1\n' ;;
        "-g therm") printf 'Note: No thermal warning level has been recorded\nCPU_Speed_Limit 	= 80\n' ;;
        esac""",
    )
    assert power_source() == "Battery Power" and low_power_mode() is True
    assert (
        thermal_state() == "Note: No thermal warning level has been recorded; CPU_Speed_Limit = 80"
    )


def test_without_pmset_nothing_is_made_up(program, monkeypatch, tmp_path):
    monkeypatch.setattr("ane_moe.benchmark.surroundings.POWER_SUPPLIES", tmp_path)
    assert power_source() is low_power_mode() is thermal_state() is None
    for name, kind, online in (("BAT0", "Battery", ""), ("AC", "Mains", "1\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "type").write_text(f"{kind}\n")
        (tmp_path / name / "online").write_text(online)
    assert power_source() == "AC Power"
    (tmp_path / "AC" / "online").write_text("0\n")
    assert power_source() == "Battery Power"


# -- mlx-lm
# --------------------------------------------------------------------------------------------------

MLX = """
from types import SimpleNamespace
__version__ = "0.28.2"
turns = iter(range(100))

def load(path):
    return "model", "tokenizer"

def stream_generate(model, tokenizer, prompt, max_tokens):
    assert tokenizer == ("tokens", []) and (prompt == [5, 6, 7] or len(prompt) == 16)
    turn = next(turns)          # the first warms up
    rate = 1.0 if turn == 0 else 100.0 * turn
    for count in range(1, max_tokens + 1):
        yield SimpleNamespace(prompt_tps=rate, generation_tps=rate / 10, generation_tokens=count, peak_memory=1.5)
"""


@pytest.fixture
def mlx(tmp_path, monkeypatch):
    folder = tmp_path / "site" / "mlx_lm"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(MLX)
    (folder / "tokenizer_utils.py").write_text(
        textwrap.dedent("""
        def load_tokenizer(path, eos_token_ids):
            return "tokens", eos_token_ids
    """)
    )
    monkeypatch.setenv("PYTHONPATH", f"{folder.parent}:{':'.join(sys.path)}")


def test_mlx_runs_the_same_prompt_and_its_medians_leave_the_warm_up_out(
    mlx, small, small_checkpoint
):
    found = run_mlx(small_checkpoint, read_manifest(small), OURS, [5, 6, 7])
    theirs = found.theirs
    assert (theirs.name, theirs.prefill_tok_s, theirs.decode_tok_s) == ("mlx-lm 0.28.2", 200, 20)
    assert (theirs.new_tokens, theirs.peak_bytes, theirs.runs) == (4, 1_500_000_000, 3)
    assert (found.ours, found.prompt_tokens) == (OURS, 3) and "GPU" in found.remark


def test_bench_shows_energy_and_the_other_program_beside_its_own_figures(
    mlx, program, tmp_path, small, small_checkpoint
):
    fake_powermetrics(program, tmp_path)
    options = BenchOptions(
        runs=1, warmup=0, tokens=4, fills=(0,), lengths=(16,), energy=True, vs_mlx=small_checkpoint
    )
    report = bench(small, options, runtime="reference")
    versus, document = report.versus, report.as_json()
    assert (versus.prompt_tokens, versus.ours.new_tokens, versus.theirs.new_tokens) == (16, 4, 4)
    assert versus.ours.prefill_tok_s > 0 and versus.ours.decode_tok_s > 0
    assert (
        document["versus"]["theirs"]["name"] == "mlx-lm 0.28.2" and document["energy"]["tokens"] > 0
    )
    text = StringIO()
    Console(file=text, width=160).print(bench_report(report))
    assert all(
        words in text.getvalue()
        for words in ("mlx-lm 0.28.2", "mJ per token", "estimates by powermetrics")
    )


def test_a_failing_mlx_is_named(mlx, tmp_path, small, small_checkpoint):
    (tmp_path / "site" / "mlx_lm" / "tokenizer_utils.py").write_text(
        "raise RuntimeError('no Metal device')"
    )
    with pytest.raises(UserError, match="no Metal device"):
        run_mlx(small_checkpoint, read_manifest(small), OURS, [5, 6, 7])


def test_without_mlx_it_says_what_to_install(small, small_checkpoint):
    if sys.platform == "darwin":
        pytest.skip("mlx-lm may be there")
    with pytest.raises(UserError, match="pip install mlx-lm"):
        run_mlx(small_checkpoint, read_manifest(small), OURS, [5, 6, 7])


def test_another_model_is_not_compared(small, small_checkpoint, tmp_path):
    (tmp_path / "config.json").write_text((small_checkpoint / "config.json").read_text())
    edit_config(tmp_path, hidden_size=48)
    with pytest.raises(UserError, match="hidden_size 48 for 24"):
        run_mlx(tmp_path, read_manifest(small), OURS, [5, 6, 7])
    with pytest.raises(UserError, match="no model folder"):
        run_mlx(tmp_path / "nowhere", read_manifest(small), OURS, [5, 6, 7])
