"""A cluster of worker processes writes what a local conversion writes, byte for byte, whoever dies."""

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ane_moe.conversion import cluster as cluster_module
from ane_moe.conversion.cluster import Conditions, installed
from ane_moe.conversion.pipeline import ConvertOptions, convert
from ane_moe.errors import UserError
from tests.conversion.test_convert import contents
from tests.models import make_model, save_checkpoint

distributed = pytest.importorskip("distributed")
OPTIONS = ConvertOptions(prefill=0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(make_model("mixtral"), tmp_path_factory.mktemp("model") / "checkpoint")


@pytest.fixture(scope="module")
def local(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("conversion") / "out"
    convert(checkpoint, out, OPTIONS)
    return out


@pytest.fixture(scope="module")
def cluster():
    with distributed.LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        processes=True,
        scheduler_port=0,
        dashboard_address=None,
    ) as opened:
        yield opened


def test_a_cluster_writes_the_same_bytes_and_resumes_a_local_conversion(
    checkpoint, local, cluster, tmp_path
):
    out, address = tmp_path / "out", cluster.scheduler_address
    report = convert(checkpoint, out, OPTIONS, cluster=address)
    assert not report.reused and contents(out) == contents(local)
    assert not convert(checkpoint, out, OPTIONS).written  # here, what the cluster wrote
    assert not convert(checkpoint, out, OPTIONS, cluster=address).written
    assert contents(out) == contents(local)


def test_killed_workers_lose_nothing(checkpoint, local, cluster, tmp_path):
    out, killed = tmp_path / "out", []

    def kill() -> None:
        for _ in range(3):
            with distributed.Client(cluster.scheduler_address, set_as_default=False) as client:
                pids = list(client.run(os.getpid, on_error="ignore").values())
            if pids:
                os.kill(pids[0], signal.SIGKILL)
                killed.append(pids[0])
            time.sleep(0.2)

    killing = threading.Thread(target=kill)
    killing.start()
    convert(checkpoint, out, OPTIONS, cluster=cluster.scheduler_address)
    killing.join()
    assert killed and contents(out) == contents(local)


def test_another_version_is_refused_by_name_before_anything_is_written(
    checkpoint, cluster, tmp_path, monkeypatch
):
    monkeypatch.setattr(cluster_module, "installed", lambda: installed() | {"numpy": "0.1"})
    with pytest.raises(UserError, match=r"worker tcp://\S+ has numpy \S+, not 0\.1"):
        convert(checkpoint, tmp_path / "out", OPTIONS, cluster=cluster.scheduler_address)
    assert not list((tmp_path / "out").rglob("*.mlpackage"))


def test_what_a_worker_lacks_is_said(tmp_path: Path) -> None:
    file, marker = tmp_path / "weights", tmp_path / "marker"
    file.write_bytes(b"1234")
    marker.write_text("x")
    good = Conditions(tuple(installed().items()), ((file, 4),), marker, "x")
    assert good.objection() == ""
    elsewhere = tmp_path / "elsewhere"
    assert "does not see" in replace(good, sizes=((elsewhere, 4),)).objection()
    assert "another file" in replace(good, sizes=((file, 5),)).objection()
    assert "another folder" in replace(good, text="y").objection()
    assert "does not see" in replace(good, marker=elsewhere / "marker").objection()


def test_a_scheduler_that_does_not_answer_is_one_line(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_module, "CONNECT_SECONDS", 1)
    with pytest.raises(UserError, match="no scheduler answers at tcp://127") as raised:
        convert(checkpoint, tmp_path / "out", OPTIONS, cluster="tcp://127.0.0.1:1")
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()
