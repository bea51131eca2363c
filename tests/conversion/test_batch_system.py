"""A cluster that a file has a batch system start; `sbatch` and `scancel` are scripts that run the
job beside, and end it."""

import os
import sys
from pathlib import Path

import pytest

from ane_moe.conversion.batch_system import BatchSystem, read_batch_system, started
from ane_moe.conversion.pipeline import ConvertOptions, convert
from ane_moe.errors import UserError
from tests.conversion.test_convert import contents
from tests.models import make_model, save_checkpoint

SBATCH = """#!/bin/sh
cp "$1" "{folder}/job.sh"
setsid sh "{folder}/job.sh" > "{folder}/log" 2>&1 &
echo $! >> "{folder}/jobs"
echo "Submitted batch job $!"
"""
SCANCEL = """#!/bin/sh
echo $1 >> "{folder}/cancelled"
kill -TERM -$1
"""
JOBS = """
system = "slurm"
jobs = 1
cores = 2
memory = "2GB"
queue = "night"
account = "mine"
walltime = "00:20:00"
interface = "lo"
before = ["export PYTHONPATH={root} OMP_NUM_THREADS=1"]
directives = ["--qos=low"]
wait_minutes = 3
"""


@pytest.fixture
def given(tmp_path: Path) -> Path:
    path = tmp_path / "slurm.toml"
    path.write_text(JOBS.format(root=Path(__file__).parents[2]))
    return path


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("scancel", SCANCEL)):
        (folder / name).write_text(text.format(folder=folder))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_jobs_of_slurm_convert_and_are_cancelled(given: Path, slurm: Path, tmp_path: Path) -> None:
    pytest.importorskip("dask_jobqueue")
    checkpoint = save_checkpoint(make_model("mixtral"), tmp_path / "checkpoint")
    options = ConvertOptions(prefill=0)
    convert(checkpoint, tmp_path / "alone", options)
    convert(checkpoint, tmp_path / "out", options, cluster=str(given))
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    script = (slurm / "job.sh").read_text()
    for line in ("#SBATCH -p night", "#SBATCH -A mine", "#SBATCH -t 00:20:00", "#SBATCH --qos=low"):
        assert line in script.splitlines()
    assert "--nthreads 1 " in script and "--nworkers 2 " in script and sys.executable in script
    assert (slurm / "cancelled").read_text() == (slurm / "jobs").read_text()


def test_where_nothing_can_be_submitted_it_says_so(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("dask_jobqueue")
    monkeypatch.setenv("PATH", str(tmp_path))
    checkpoint = save_checkpoint(make_model("mixtral"), tmp_path / "checkpoint")
    with pytest.raises(UserError, match="there is no sbatch here; run this where jobs"):
        convert(checkpoint, tmp_path / "out", cluster=str(given))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [(('"lo"', '"none0"'), "not a valid network interface"), (('"2GB"', '"lots"'), "lots")],
)
def test_what_dask_jobqueue_refuses_is_one_line(
    given: Path, slurm: Path, change: tuple[str, str], said: str
) -> None:
    pytest.importorskip("dask_jobqueue")
    given.write_text(given.read_text().replace(*change))
    with (
        pytest.raises(UserError, match=f"a cluster of slurm does not begin; found: .*{said}"),
        started(read_batch_system(given)),
    ):
        pass


def test_a_file_is_read_into_what_dask_jobqueue_takes(given: Path) -> None:
    batch = read_batch_system(given)
    assert batch == BatchSystem("slurm", 1, 3, batch.options)
    assert batch.options["job_extra_directives"] == ["--qos=low"] and batch.options["cores"] == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("queue", "partition"), "has unknown entries; found: partition; known: .*queue"),
        (('"slurm"', '"cron"'), "no such batch system; found: 'cron'; known: slurm"),
        (("jobs = 1", ""), "lacks jobs"),
        (("cores = 2", "cores = 0"), "cores is not a whole number from 1; found: 0"),
        (("jobs = 1", "jobs = true"), "jobs is not a whole number from 1; found: True"),
        (('["--qos=low"]', "[1]"), r"directives is not a list of texts; found: \[1\]"),
        (('"2GB"', "2"), "memory is not a text; found: 2"),
        (("jobs = 1", "jobs"), "is not TOML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(given: Path, change: tuple[str, str], said: str) -> None:
    given.write_text(given.read_text().replace(*change))
    with pytest.raises(UserError, match=said):
        read_batch_system(given)


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"slurm\.toml cannot be read; found: No such file"):
        read_batch_system(tmp_path / "slurm.toml")
