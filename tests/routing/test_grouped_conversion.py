"""A conversion whose functions hold the experts a grouping names: right where it is, wrong where it
is not."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from ane_moe.cli import app
from ane_moe.errors import UserError
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from ane_moe.manifest import read_manifest
from ane_moe.routing.grouping import Grouping, write_grouping
from ane_moe.verification.verify import verify
from tests.verification.tiny import tiny_checkpoint, tiny_conversion

GROUPS = ((0, 3), (1, 2))
IDS = np.random.default_rng(0).integers(0, 60, 24).tolist()
SPARSE = {"routing": "sparse", "expert_tokens": (1, 4), "experts_per_function": 2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint("qwen3_moe", tmp_path_factory.mktemp("grouped") / "checkpoint")


@pytest.fixture(scope="module")
def grouped(checkpoint, tmp_path_factory):
    return tiny_conversion(
        checkpoint,
        tmp_path_factory.mktemp("grouped") / "out",
        groups={0: GROUPS},
        golden=True,
        **SPARSE,
    )


def test_grouped_functions_pass_verify_and_compute_what_neighbours_compute(
    checkpoint, grouped, tmp_path
):
    manifest = read_manifest(grouped)
    (shard,) = manifest.shards_of("experts", 0)
    assert (tuple(shard.copies), shard.experts) == (GROUPS, (0, 1, 2, 3))
    assert [function.name for function in shard.functions] == [
        f"expert_00{first}_t{tokens}" for first in (0, 1) for tokens in (1, 4)
    ]
    report = verify(grouped)
    assert report.passed and any(row.function == "expert_001_t4" for row in report.shards)
    plain = tiny_conversion(checkpoint, tmp_path / "out", **SPARSE)
    ours, theirs = (
        Session(load_shards(folder)).prefill_logits(IDS, by="decode") for folder in (grouped, plain)
    )
    np.testing.assert_allclose(ours, theirs, atol=0.02)


def test_a_manifest_that_names_other_groups_fails_verify(grouped, tmp_path):
    meta = json.loads((grouped / "runtime_meta.json").read_text())
    swapped = {(0, 3): [0, 2], (1, 2): [1, 3]}
    for shard in meta["shards"]:
        for function in shard["functions"] if shard["kind"] == "experts" else []:
            function["experts"] = swapped[tuple(function["experts"])]
    other = tmp_path / "other"
    other.mkdir()
    for path in grouped.iterdir():
        (other / path.name).symlink_to(path)
    (other / "runtime_meta.json").unlink()
    (other / "runtime_meta.json").write_text(json.dumps(meta))
    report = verify(other)
    assert not report.integrity and not report.passed
    assert all(not row.passed for row in report.shards if row.kind == "experts")


@pytest.mark.parametrize(
    "groups",
    [
        {1: GROUPS},
        {0: ((0, 3), (1,))},
        {0: ((0, 1, 2), (3,))},
        {0: ((3, 0), (1, 2))},
        {0: ((0, 3), (1, 2), (4,))},
    ],
)
def test_a_grouping_of_another_model_is_refused(checkpoint, tmp_path, groups):
    with pytest.raises(UserError, match="does not fit layer 0"):
        tiny_conversion(checkpoint, tmp_path / "out", groups=groups, **SPARSE)


def test_the_command_reads_a_grouping_and_refuses_one_that_disagrees(checkpoint, tmp_path):
    path = tmp_path / "grouping.json"
    write_grouping(Grouping(2, {0: GROUPS}), path)
    convert = [
        "convert",
        str(checkpoint),
        str(tmp_path / "out"),
        "--grouping",
        str(path),
        "--dry-run",
        "--json",
    ]
    document = json.loads(CliRunner().invoke(app, [*convert, "--routing", "sparse"]).stdout)
    assert document["shards"]
    masked = CliRunner().invoke(app, convert)
    assert isinstance(masked.exception, UserError) and "routing" in str(masked.exception)
    other = CliRunner().invoke(
        app, [*convert, "--routing", "sparse", "--experts-per-function", "4"]
    )
    assert isinstance(other.exception, UserError) and "disagree" in str(other.exception)
