"""A cluster of worker processes writes what a local conversion writes, byte for byte, whoever dies."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest

from ane_moe.conversion import cluster as cluster_module
from ane_moe.conversion import pipeline, stamping
from ane_moe.conversion.batch_system import BatchSystem
from ane_moe.conversion.cluster import RESOURCE, Conditions, installed
from ane_moe.conversion.job import open_job
from ane_moe.conversion.output_folder import MARKER
from ane_moe.conversion.pipeline import ConvertOptions, convert
from ane_moe.conversion.templates import templates_of
from ane_moe.emit.coreml.template_cache import TemplateCache
from ane_moe.errors import UserError
from ane_moe.files import TEMPORARY
from ane_moe.formats.recipe import find_recipe
from ane_moe.manifest import FILE_NAME
from ane_moe.verification.verify import verify
from tests.checkpoints.hub_server import point_at, served
from tests.conversion import bucket
from tests.conversion.test_convert import contents
from tests.conversion.trouble import VARIABLE, Trouble
from tests.models import make_model, save_checkpoint

dask = pytest.importorskip("dask")
distributed = pytest.importorskip("distributed")
OPTIONS = ConvertOptions(prefill=0)
SHARD = "moe/layer_01.mlpackage"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(make_model("mixtral"), tmp_path_factory.mktemp("model") / "checkpoint")


@pytest.fixture(scope="module")
def local(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("conversion") / "out"
    convert(checkpoint, out, OPTIONS)
    return out


@pytest.fixture(scope="module")
def own_trouble(tmp_path_factory):
    return Trouble(tmp_path_factory.mktemp("trouble"))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A folder with what is behind bucket:// in workers, and with a client's that they do not
    see."""
    folder = tmp_path_factory.mktemp("store")
    for name in ("bucket", "client/cache", "client/scratch"):
        (folder / name).mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def hub():
    with served({}) as opened:
        yield opened


@pytest.fixture(scope="module")
def cluster(own_trouble, store, hub):
    with (
        # As long as a killed worker may take to be there again, on a machine with much to do.
        dask.config.set({"distributed.deploy.lost-worker-timeout": "10 minutes"}),
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            scheduler_port=0,
            dashboard_address=":0",
            preload=["tests.conversion.trouble", "tests.conversion.bucket"],
            env={
                VARIABLE: str(own_trouble.folder),
                bucket.VARIABLE: str(store / "bucket"),
                bucket.UNSEEN: str(store / "client"),
                "HF_ENDPOINT": hub.endpoint,
                "HF_TOKEN": "hf_worker",
            },
        ) as opened,
    ):
        own_trouble.begin()
        opened.wait_for_workers(2)
        yield opened


@pytest.fixture
def trouble(own_trouble, cluster):
    while len(cluster.scheduler.workers) < 2:  # those that were killed before
        time.sleep(0.05)
    own_trouble.begin()
    yield own_trouble
    own_trouble.begin()


@pytest.fixture
def address(cluster):
    return cluster.scheduler_address


def pids(cluster) -> dict[int, int]:
    """Process of each worker, by its name."""
    return {name: nanny.pid for name, nanny in cluster.workers.items()}


def test_a_cluster_writes_the_same_bytes_and_resumes_a_local_conversion(
    checkpoint, local, address, tmp_path
):
    out = tmp_path / "out"
    report = convert(checkpoint, out, OPTIONS, cluster=address)
    assert not report.reused and not report.notes and contents(out) == contents(local)
    assert not convert(checkpoint, out, OPTIONS).written  # here, what the cluster wrote
    shutil.rmtree(out / SHARD)
    shutil.rmtree(out / "attn" / "layer_02.mlpackage")
    (out / FILE_NAME).rename(out / MARKER)  # as the conversion was before its end
    (out / MARKER).write_text(json.dumps(json.loads((out / MARKER).read_text())["source"]))
    report = convert(checkpoint, out, OPTIONS, cluster=address)
    assert report.written == ("attn/layer_02.mlpackage", SHARD)
    assert contents(out) == contents(local)


def kill_workers(cluster, trouble, count: int, ended: threading.Event) -> list[str]:
    """Kill `count` workers, now and then, each while it stamps a shard; those shards. None that
    three workers died of: the fourth ends a conversion."""
    dead: set[int] = set()
    killed, draw = [], random.Random(0)
    while len(killed) < count and not ended.is_set():
        time.sleep(draw.uniform(0.0, 0.1))
        at = {pid: shard for pid, shard in trouble.running().items() if pid not in dead}
        fair = [pid for name, pid in pids(cluster).items() if pid in at and spared(cluster, name)]
        if fair:
            os.kill(pid := draw.choice(fair), signal.SIGKILL)
            dead.add(pid)
            time.sleep(0.05)
            if pid in trouble.running():  # its mark is there for ever: it was at the shard
                killed.append(at[pid])
    return killed


def spared(cluster, name: int) -> bool:
    """Whether no call of a worker, those that wait there too, is near the scheduler's limit."""
    state = cluster.scheduler.workers.get(cluster.scheduler.aliases.get(name))
    return state is not None and all(task.suspicious < 2 for task in list(state.processing))


def converted_with_kills(cluster, trouble, count: int, *arguments) -> list[str]:
    ended, killed = threading.Event(), []
    killing = threading.Thread(
        target=lambda: killed.extend(kill_workers(cluster, trouble, count, ended))
    )
    killing.start()
    try:
        convert(*arguments, cluster=cluster.scheduler_address)
    finally:
        ended.set()
        killing.join()
    return killed


def test_workers_killed_at_a_shard_lose_nothing(checkpoint, local, cluster, trouble, tmp_path):
    out = tmp_path / "out"
    trouble.begin(seconds=0.2)
    killed = converted_with_kills(cluster, trouble, 2, checkpoint, out, OPTIONS)
    assert len(killed) == 2 and contents(out) == contents(local)


@pytest.mark.slow
def test_twenty_kills_in_one_conversion_lose_nothing(cluster, trouble, tmp_path):
    deep = make_model("mixtral", num_hidden_layers=12)
    checkpoint = save_checkpoint(deep, tmp_path / "checkpoint")
    out, alone = tmp_path / "out", tmp_path / "alone"
    convert(checkpoint, alone, OPTIONS)
    trouble.begin(seconds=0.4)
    killed = converted_with_kills(cluster, trouble, 20, checkpoint, out, OPTIONS)
    assert len(killed) == 20 and contents(out) == contents(alone)


def test_a_shard_that_workers_die_of_is_named(checkpoint, cluster, trouble, tmp_path, monkeypatch):
    out = tmp_path / "out"
    trouble.begin(deadly=SHARD)
    wanted = rf"4 workers died of {SHARD}, one after the other; found: the last was tcp://\S+; "
    with pytest.raises(UserError, match=wanted) as raised:
        convert(checkpoint, out, OPTIONS, cluster=cluster.scheduler_address)
    assert "\n" not in str(raised.value)
    trouble.begin()
    report = convert(checkpoint, out, OPTIONS)
    assert SHARD in report.written and report.reused


def test_a_worker_with_a_full_disk_is_left_out(
    checkpoint, local, cluster, address, trouble, tmp_path
):
    out = tmp_path / "out"
    trouble.begin(full=(0,))
    (note,) = convert(checkpoint, out, OPTIONS, cluster=address).notes
    own = cluster.scheduler.aliases[0]
    assert note.startswith(f"worker {own} was left out: the disk is full: ")
    assert {pid for pid, _ in trouble.stamped()} == {pids(cluster)[1]}
    assert contents(out) == contents(local)


def test_workers_without_a_common_disk_read_and_write_at_addresses(
    checkpoint, local, cluster, trouble, store, monkeypatch
):
    monkeypatch.setenv(bucket.VARIABLE, "")
    bucket.begin(store / "bucket")
    shutil.copytree(checkpoint, store / "bucket" / "models" / "tiny")
    (store / "client" / "cache" / "templates").symlink_to(TemplateCache().folder)
    monkeypatch.setenv("ANE_MOE_CACHE", str(store / "client" / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(store / "client" / "scratch"))
    trouble.begin(seconds=0.2)
    out = Path("bucket://some/out")
    given = (Path("bucket://models/tiny"), out, OPTIONS)
    killed = converted_with_kills(cluster, trouble, 1, *given)
    written = store / "bucket" / "some" / "out"
    assert len(killed) == 1 and contents(written) == contents(local)
    report = convert(checkpoint, out, OPTIONS)  # here, from the disk
    assert not report.written and contents(written) == contents(local)
    shutil.copytree(checkpoint, store / "client" / "model")
    with pytest.raises(PermissionError):  # nothing else of this machine is read by them
        convert(store / "client" / "model", out, OPTIONS, cluster=cluster.scheduler_address)


def test_workers_read_the_hub_by_ranges_with_a_token_of_their_own(
    checkpoint, cluster, trouble, store, hub, tmp_path, monkeypatch
):
    hub.models["someone/tiny"] = checkpoint
    hub.gated = ("hf_client", "hf_worker")
    templates = TemplateCache().folder
    point_at(hub, store / "client" / "hub", monkeypatch)
    TemplateCache().folder.parent.mkdir(parents=True)
    TemplateCache().folder.symlink_to(templates)
    monkeypatch.setenv("HF_TOKEN", "hf_client")
    out = tmp_path / "out"
    convert(Path("someone/tiny"), out, OPTIONS, cluster=cluster.scheduler_address)
    readers = {token for file, token in hub.asked_by if file == "model.safetensors"}
    assert readers == {"hf_client", "hf_worker"}
    convert(Path("someone/tiny"), tmp_path / "alone", OPTIONS)
    assert contents(out) == contents(tmp_path / "alone")
    assert not any(b"hf_" in data for data in contents(out).values())


def test_full_disks_everywhere_are_one_line(checkpoint, local, address, trouble, tmp_path):
    out = tmp_path / "out"
    trouble.begin(full=(0, 1))
    with pytest.raises(UserError, match="no worker has room to write to; the disk is full") as e:
        convert(checkpoint, out, OPTIONS, cluster=address)
    assert "\n" not in str(e.value)
    trouble.begin()
    convert(checkpoint, out, OPTIONS, cluster=address)
    assert contents(out) == contents(local)


CLIENT = """
import sys
from pathlib import Path
from ane_moe.conversion.pipeline import ConvertOptions, convert
checkpoint, out, address = sys.argv[1:]
convert(Path(checkpoint), Path(out), ConvertOptions(prefill=0), cluster=address)
"""


def test_a_killed_client_loses_nothing(checkpoint, local, address, trouble, tmp_path):
    out = tmp_path / "out"
    trouble.begin(seconds=0.5)
    given = [sys.executable, "-c", CLIENT, str(checkpoint), str(out), address]
    with subprocess.Popen(given, cwd=ROOT) as client:
        while not trouble.stamped() or not trouble.running():
            assert client.poll() is None
            time.sleep(0.02)
        client.kill()
    finished = trouble.stamped()
    report = convert(checkpoint, out, OPTIONS, cluster=address)
    assert {shard for _, shard in finished} <= {*report.reused}
    # What a worker was at has been waited for, not done again beside it.
    times = Counter(shard for _, shard in trouble.stamped())
    assert set(times.values()) == {1} and times.keys() == {*report.reused, *report.written}
    assert contents(out) == contents(local)


def test_workers_with_the_resource_are_used_alone(
    checkpoint, local, cluster, address, trouble, tmp_path
):
    async def offer(dask_worker) -> None:
        await dask_worker.set_resources(**{RESOURCE: 1})

    with distributed.Client(address, set_as_default=False) as client:
        client.run(offer, workers=[cluster.scheduler.aliases[1]])
    chosen = pids(cluster)[1]
    convert(checkpoint, tmp_path / "out", OPTIONS, cluster=address)
    assert {pid for pid, _ in trouble.stamped()} == {chosen}
    assert contents(tmp_path / "out") == contents(local)
    os.kill(chosen, signal.SIGKILL)  # the next one offers nothing


@pytest.mark.slow
def test_functions_are_proved_by_workers_as_here(checkpoint, address, trouble, tmp_path):
    out = tmp_path / "out"
    convert(checkpoint, out, replace(OPTIONS, recipe=find_recipe("int8")), golden=True)
    here = verify(out, runtime="reference")
    there = verify(out, runtime="reference", cluster=address)
    assert here.passed and there == replace(here, folder=there.folder) and len(there.shards) > 6
    now = verify(out, runtime="reference", cluster=address, checkpoint=checkpoint)
    assert now == replace(there, golden_tokens=now.golden_tokens) and now.passed


class NoCluster:
    """A scheduler with a worker, or with none, which is busy for ever."""

    def __init__(self, workers: int):
        self._workers = {f"tcp://{n}": {"resources": {}, "nthreads": 1} for n in range(workers)}

    def scheduler_info(self, **_):
        return {"workers": self._workers}

    def run(self, *_, **__):
        return dict.fromkeys(self._workers, True)


def test_waiting_for_workers_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_module, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(cluster_module, "EARLIER_SECONDS", 0.05)
    jobs = BatchSystem("slurm", 1, 1, {"log_directory": "/logs"}).advice
    with pytest.raises(UserError, match=r"none within 0\.05 s; look at .* of a job in /logs"):
        cluster_module.Cluster(NoCluster(0), "tcp://x", tmp_path, jobs).begin(0.05)
    with pytest.raises(UserError, match="an earlier run left them to do; found: tcp://0; start"):
        cluster_module.Cluster(NoCluster(1), "tcp://x", tmp_path, jobs).begin(0.05)


def _stamp_again(job, templates, times: int) -> None:
    for _ in range(times):
        stamping.stamp_shard(job, templates)


def test_writers_of_one_shard_do_not_mix(checkpoint, local, tmp_path):
    job = open_job(checkpoint, tmp_path / "out", OPTIONS)
    (shard,) = (shard for shard in job.plan.shards if shard.path == SHARD)
    found = dict(templates_of(shard.graphs.values(), TemplateCache()))
    own = {prefix: found[key] for prefix, key in shard.graphs.items()}
    arguments = (stamping.shard_job(job, shard), own, 15)
    racing = [get_context("fork").Process(target=_stamp_again, args=arguments) for _ in range(3)]
    for one in racing:
        one.start()
    for one in racing:
        one.join()
    assert [one.exitcode for one in racing] == [0, 0, 0]
    assert contents(job.out / SHARD) == contents(local / SHARD)
    assert not [*job.out.rglob(f"{TEMPORARY}*")]


@contextmanager
def begun(*command: str):
    with subprocess.Popen([sys.executable, "-m", *command], stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_killed_scheduler_is_one_line(checkpoint, local, trouble, tmp_path, monkeypatch):
    out, file = tmp_path / "out", tmp_path / "scheduler.json"
    monkeypatch.setenv(VARIABLE, str(trouble.folder))
    at = ("--scheduler-file", str(file))
    there = ("--port", "0", "--no-dashboard", "--host", "127.0.0.1", *at)
    alone = ("--no-nanny", "--nthreads", "1", "--no-dashboard", *at)
    preload = ("--preload", "tests.conversion.trouble")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    with (
        begun("distributed.cli.dask_scheduler", *there) as scheduler,
        begun("distributed.cli.dask_worker", *alone, *preload),
    ):
        trouble.begin(seconds=0.2)

        def kill() -> None:
            while len(trouble.stamped()) < 2:
                time.sleep(0.02)
            scheduler.kill()

        threading.Thread(target=kill, daemon=True).start()
        while not (file.exists() and file.read_text().endswith("}")):  # written to its end
            time.sleep(0.02)
        address = json.loads(file.read_text())["address"]
        with pytest.raises(UserError, match=r"the scheduler at \S+ went away; start it") as e:
            convert(checkpoint, out, OPTIONS, cluster=address)
    assert "\n" not in str(e.value)
    trouble.begin()
    assert convert(checkpoint, out, OPTIONS).reused
    assert contents(out) == contents(local)


def test_another_version_is_refused_by_name_before_anything_is_written(
    checkpoint, address, tmp_path, monkeypatch
):
    monkeypatch.setattr(cluster_module, "installed", lambda: installed() | {"numpy": "0.1"})
    with pytest.raises(UserError, match=r"worker tcp://\S+ has numpy \S+, not 0\.1"):
        convert(checkpoint, tmp_path / "out", OPTIONS, cluster=address)
    assert not list((tmp_path / "out").rglob("*.mlpackage"))


def test_what_a_worker_lacks_is_said(tmp_path: Path) -> None:
    file, marker = tmp_path / "weights", tmp_path / "marker"
    file.write_bytes(b"1234")
    marker.write_text("x")
    good = Conditions(tuple(installed().items()), ((file, 4),), tmp_path, marker.name, "x")
    assert good.objection() == ""
    elsewhere = tmp_path / "elsewhere"
    assert "does not see" in replace(good, sizes=((elsewhere, 4),)).objection()
    assert "another file" in replace(good, sizes=((file, 5),)).objection()
    assert "another folder" in replace(good, text="y").objection()
    assert "does not see" in replace(good, out=elsewhere).objection()
    needed = replace(good, versions=(*good.versions, ("of-no-index", "1.0")))
    assert needed.objection() == "has of-no-index not installed, not 1.0"


def test_workers_without_what_writes_assets_are_refused(
    checkpoint, address, tmp_path, monkeypatch
) -> None:
    assert installed()  # kept, before `_version` is another one
    monkeypatch.setattr(pipeline, "DISTRIBUTIONS", ("pytest", "of-no-index"))
    monkeypatch.setattr(cluster_module, "_version", lambda name: f"{name} 0.1")
    options = ConvertOptions(prefill=0, format="aimodel")
    with pytest.raises(UserError, match=r"worker tcp://\S+ has pytest [0-9.]+, not pytest 0\.1"):
        convert(checkpoint, tmp_path / "out", options, cluster=address)
    assert not list((tmp_path / "out").rglob("*.aimodel"))


def test_a_scheduler_that_does_not_answer_is_one_line(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_module, "CONNECT_SECONDS", 1)
    with pytest.raises(UserError, match="no scheduler answers at tcp://127") as raised:
        convert(checkpoint, tmp_path / "out", OPTIONS, cluster="tcp://127.0.0.1:1")
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()
