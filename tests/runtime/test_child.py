"""Trials in a child process: what ends or hangs the child becomes an error that says so."""

import os
import signal
import subprocess
import sys
import time

import pytest

from ane_moe.errors import UserError
from ane_moe.placement.measured import COMMAND
from ane_moe.runtime.coreml import runtime as coreml
from ane_moe.runtime.coreml import trial as child
from ane_moe.runtime.coreml.modelc_cache import ModelCache
from tests.standin.fixtures import standin as standin
from tests.standin.packages import accumulator

TRIAL = child.Trial("net.mlpackage", "decode", "cpu_and_ne", "cache", "24F74", 1)
PATIENCE_SECONDS = 120.0  # for a child that is expected to answer, on a busy machine


@pytest.fixture(autouse=True)
def no_child_outlives_its_test():
    child.stop()
    yield
    child.stop()


@pytest.fixture
def act(monkeypatch):
    """Have children run a line of Python instead, once they are asked."""

    def act(code, prefix="import os, sys, signal, time; sys.stdin.readline(); "):
        monkeypatch.setattr(child, "COMMAND", (sys.executable, "-c", prefix + code))

    return act


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize(
    ("number", "cause"),
    [
        (signal.SIGKILL, "memory runs out, or when the Neural Engine cannot hold the model"),
        (signal.SIGSEGV, "a crash inside Core ML, known for palettized weights"),
        (signal.SIGABRT, "an assertion inside Core ML"),
        (signal.SIGBUS, "a crash inside Core ML: try"),
    ],
)
def test_a_signal_is_named_with_its_usual_cause(act, number, cause):
    act(
        f"print('ANE: out of space', file=sys.stderr, flush=True); os.kill(os.getpid(), "
        f"{int(number)})"
    )
    with pytest.raises(
        UserError,
        match=rf"'decode' of net\.mlpackage killed .*{number.name}: ANE: out of .*{cause}",
    ):
        child.try_function(TRIAL, PATIENCE_SECONDS)


def test_an_exit_is_reported_with_its_code_and_last_words(act):
    act("print('terminating due to uncaught exception', file=sys.stderr, flush=True); os._exit(3)")
    with pytest.raises(UserError, match="exit code 3: terminating due to uncaught exception"):
        child.try_function(TRIAL, PATIENCE_SECONDS)


def test_long_last_words_are_cut_to_their_end_on_one_line(act):
    act("print('noise\\n' * 9999 + 'the reason', file=sys.stderr, flush=True); os._exit(3)")
    with pytest.raises(UserError, match="the reason") as caught:
        child.try_function(TRIAL, PATIENCE_SECONDS)
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


def test_an_exit_in_the_middle_of_an_answer_is_no_answer(act):
    act("sys.stdout.write('{'); sys.stdout.flush(); os._exit(0)")
    with pytest.raises(UserError, match="exit code 0"):
        child.try_function(TRIAL, PATIENCE_SECONDS)


def test_a_hang_ends_at_the_limit_and_the_child_with_it(act, tmp_path):
    act(f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(3600)")
    with pytest.raises(
        UserError, match=r"did not finish .* no answer within 3 s.*smaller shards, or give"
    ):
        child.try_function(TRIAL, 3.0)
    pid = (tmp_path / "pid").read_text()
    assert pid and gone(int(pid))


def test_the_childs_own_error_is_raised_as_it_was_and_the_child_serves_on(act):
    act(
        'print(\'{"error": {"what": "bad", "found": "x", "do": "y"}}\', flush=True); '
        "sys.stdin.readline(); print('{}', flush=True); sys.stdin.read()"
    )
    with pytest.raises(UserError, match="bad; found: x; y"):
        child.try_function(TRIAL, PATIENCE_SECONDS)
    child.try_function(TRIAL, PATIENCE_SECONDS)  # an answer only the same child gives


def test_a_child_that_died_between_trials_is_replaced(act, tmp_path):
    act(
        f"open({str(tmp_path / 'pids')!r}, 'a').write(f'{{os.getpid()}} '); print('{{}}', "
        f"flush=True)"
    )
    child.try_function(TRIAL, PATIENCE_SECONDS)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while child._running.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    child.try_function(TRIAL, PATIENCE_SECONDS)
    assert len((tmp_path / "pids").read_text().split()) == 2


def test_a_child_whose_parent_is_gone_ends():
    parent = (
        "import subprocess, sys\n"
        "from ane_moe.runtime.coreml import trial\n"
        "print(trial.TrialProcess().process.pid, flush=True)\n"
        "import os; os.kill(os.getpid(), 9)"
    )
    pid = int(subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True).stdout)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not gone(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert gone(pid)


def test_a_function_is_tried_once_and_what_kills_or_hangs_core_ml_does_not_reach_us(
    tmp_path, standin
):
    """Two children's worth of coremltools imports, so one test for the whole story."""
    package, cache = accumulator(tmp_path / "net.mlpackage"), ModelCache(tmp_path / "cache")
    compiled, loaded, predicted = "compile net.mlpackage", "load {}", "predict {}"

    def load(function, **options):
        return coreml.load_function(package, function, cache=cache, **options)

    load("decode", time_limit_seconds=PATIENCE_SECONDS)
    assert standin.log() == [
        compiled,
        loaded.format("decode"),
        predicted.format("decode"),
        loaded.format("decode"),
    ]
    load("decode")  # now known to be good: loaded here and not predicted
    assert standin.log()[4:] == [loaded.format("decode")]
    assert [entry.good for entry in cache.entries()] == [("decode-cpu_and_ne",)]

    standin.script(predict="error")  # the child's own error, and it lives
    with pytest.raises(
        UserError, match=r"could not run function 'prefill' of .*scripted predict error"
    ):
        load("prefill", time_limit_seconds=PATIENCE_SECONDS)
    standin.script(predict="fp32")
    with pytest.raises(UserError, match="declared fp16"):
        load("prefill", time_limit_seconds=PATIENCE_SECONDS)
    standin.script(load="hang")
    with pytest.raises(UserError, match="no answer within 2 s"):
        load("prefill", time_limit_seconds=2)
    assert standin.log()[-1] == loaded.format("prefill")  # it was Core ML that hung
    standin.script(load="ok", predict="kill")
    with pytest.raises(
        UserError, match=r"'prefill' of .*net\.mlpackage killed the trial process; found: SIGKILL"
    ):
        load("prefill", time_limit_seconds=PATIENCE_SECONDS)
    assert [entry.good for entry in cache.entries()] == [("decode-cpu_and_ne",)]


def test_an_interrupt_ends_the_child_too(act, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    act("time.sleep(3600)")
    running = child.TrialProcess()
    monkeypatch.setattr(child, "TrialProcess", lambda: running)
    monkeypatch.setattr(child.select, "select", interrupted)
    with pytest.raises(KeyboardInterrupt):
        child.try_function(TRIAL, PATIENCE_SECONDS)
    assert running.process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("command", [child.COMMAND, COMMAND])
def test_a_child_imports_nothing_of_what_only_converting_needs(command):
    program = (
        "import runpy, sys; sys.stdin.close(); sys.stdin = []\n"
        f"runpy.run_module({command[-1]!r}, run_name='__main__')\n"
        "print(sorted({'coremltools', 'scipy', 'torch', 'transformers'} & sys.modules.keys()), file=sys.stderr)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stderr.splitlines() == ["['coremltools']"], ended.stderr
