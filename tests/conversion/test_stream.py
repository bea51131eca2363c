"""`--routing stream`, part by part: experts of every kind, the shared one, commands on the result."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ane_moe.cli import app
from ane_moe.expert_record import read_end
from ane_moe.files import sha256
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from ane_moe.manifest import read_manifest
from ane_moe.verification.verify import verify
from tests.models import make_model, save_checkpoint
from tests.verification.tiny import tiny_checkpoint, tiny_conversion

OPTIONS = {"prefill": 8, "context": 64, "expert_tokens": (1, 8)}
IDS = np.random.default_rng(0).integers(3, 60, 12).tolist()
# Biases and clamps; an affine residual, whose scale is of each expert; and a shared expert.
KINDS = ("gpt_oss", "zaya", "qwen2_moe")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("family", KINDS)
def test_experts_of_every_kind_give_what_packages_of_them_give(family, tmp_path):
    checkpoint = save_checkpoint(make_model(family), tmp_path / "checkpoint")
    rows = {}
    for routing in ("sparse", "stream"):
        out = tiny_conversion(checkpoint, tmp_path / routing, routing=routing, **OPTIONS)
        session = Session(load_shards(out, "reference"))
        rows[routing] = session.prefill_logits(IDS).copy()
    np.testing.assert_array_equal(rows["stream"], rows["sparse"])
    assert any(shard.store for shard in read_manifest(out).shards)


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stream")
    checkpoint = tiny_checkpoint("qwen3_moe", folder / "checkpoint")
    return tiny_conversion(checkpoint, folder / "out", routing="stream", golden=True, **OPTIONS)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_every_expert_of_a_store_has_a_row_that_passes(out):
    report = verify(out)
    assert report.passed
    rows = {(row.path, row.function) for row in report.shards}
    (shard,) = read_manifest(out).shards_of("experts", 0)
    assert {(shard.path, entry.name) for entry in shard.functions} <= rows


def test_an_expert_that_is_not_its_own_fails_by_name(out, tmp_path):
    """Records change places, checksums and all: files are sound, numbers are not."""
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    manifest = read_manifest(copy)
    (shard,) = manifest.shards_of("experts", 0)
    path, size = copy / shard.path, shard.store.record.size
    end = read_end(path, shard.store)
    data = path.read_bytes()
    one, two, *others = end.checksums
    swapped = replace(end, checksums=(two, one, *others)).as_bytes()
    path.write_bytes(data[size : 2 * size] + data[:size] + data[2 * size : 4 * size] + swapped)
    replace(manifest, files=manifest.files | {shard.path: sha256(path)}).write(copy)
    report = verify(copy)
    failed = {row.function for row in report.shards if not row.passed and row.path == shard.path}
    assert {"expert_000_t1", "expert_001_t1"} <= failed and "expert_002_t1" not in failed


def test_commands_work_on_a_store(out):
    ids = ",".join(map(str, IDS))
    given = ["generate", out, "--prompt-ids", ids, "--max-tokens", "3", "--json"]
    document = json.loads(run(*given, "--memory-mb", "200", "--concurrency", "2"))
    figures = document["figures"]
    assert len(document["ids"]) == 3 and figures["cache"]["misses"] > 0
    assert figures["decode"]["copies_per_token"] > 0
    bench = json.loads(run("bench", out, "--runs", "1", "--tokens", "2", "--fills", "0", "--json"))
    assert bench["memory"]["expert_cache_peak_bytes"] > 0
    assert any(row["path"].endswith(".bin") for row in bench["functions"])
    page = out.parent / "page.html"
    run("report", out, "--html", page)
    assert "stream routing" in page.read_text()


def test_inspect_shows_how_experts_lie(out):
    (shard,) = read_manifest(out).shards_of("experts", 0)
    text = run("inspect", out / shard.path)
    assert "4 experts" in " ".join(text.split()) and "16,384" in text and "gate" in text
    document = json.loads(run("inspect", out / shard.path, "--json"))
    assert document["count"] == 4 and document["record"]["size"] == 16_384


def test_plan_says_what_stays_in_memory(out):
    checkpoint = out.parent / "checkpoint"
    asked = ["plan", checkpoint, "--memory-mb", "100", "--compress", "int8,sparse50", "--json"]
    fit, refused = json.loads(run(*asked))["streams"]
    assert fit["budget"]["total"] == fit["budget"]["fitting"] == 4
    assert fit["most_read_bytes_per_token"] == 2 * 16_384  # k records of one layer
    assert refused["budget"] is None and "store of experts" in refused["refusal"]
    assert "4 of 4" in run("plan", checkpoint, "--memory-mb", "100", "--compress", "int8")
