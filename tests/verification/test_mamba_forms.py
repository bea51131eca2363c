"""Conversions of Mamba in their other forms: states that are passed, tokens before the last axis,
layers that share a shard; and configurations that are refused."""

import math

import numpy as np
import pytest
import torch

from ane_moe.checkpoints.checkpoint import open_checkpoint
from ane_moe.errors import UserError
from ane_moe.families import describe
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from ane_moe.placement.predicted import predict
from ane_moe.placement.targets import find_target
from tests.models import edit_config, make_model, save_checkpoint
from tests.placement.test_placement_shards import EXPECTED, packages_in
from tests.verification.tiny import tiny_conversion

FAMILIES = ("granitemoehybrid", "nemotron_h", "jamba")
IDS = np.random.default_rng(0).integers(3, 211, 21).tolist()


@pytest.fixture(scope="module", params=FAMILIES)
def original(request, tmp_path_factory):
    torch.set_num_threads(1)
    model = make_model(request.param)
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0].numpy()
    return save_checkpoint(model, tmp_path_factory.mktemp("mamba")), expected


def test_another_form_of_a_conversion_computes_the_same(original, tmp_path):
    """Prefill in calls of 8, the last of them padded, then decode: both go on from one state."""
    checkpoint, expected = original
    form = {"state": "explicit", "layout": "bct1", "layers_per_shard": 2}
    out = tiny_conversion(checkpoint, tmp_path, prefill=8, context=64, **form)
    shards = load_shards(out, "reference")
    assert_alike(Session(shards).prefill_logits(IDS), expected)
    session = Session(shards)
    session.prefill_logits(IDS[:11])
    assert_alike(np.stack([session.decode(token).copy() for token in IDS[11:]]), expected[11:])
    report = predict(packages_in(out), find_target("m4-max", 26))
    broken = [one for row in report.functions for one in row.findings if one.rule not in EXPECTED]
    assert not broken and report.passed


def assert_alike(logits, expected):
    norms = np.linalg.norm(logits, axis=1) * np.linalg.norm(expected, axis=1)
    assert np.median((logits * expected).sum(1) / norms) > 0.9999


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"mamba_n_groups": 4}, "mamba_n_groups.*divisor of 6"),
        ({"mamba_d_state": 40}, "mamba_d_state.*multiple of 32"),
        ({"mamba_d_state": 64}, "wrong shape"),
        ({"mamba_n_heads": 7}, "mamba_n_heads.*make up 144"),
        ({"mamba_d_head": 20}, "mamba_n_heads.*make up 144"),
        ({"mamba_d_conv": 3}, "wrong shape"),
        ({"time_step_limit": [0.0, 0.1]}, "time_step_limit"),
        ({"layer_types": ["mamba", "sliding_attention"]}, "layer_types"),
    ],
)
def test_what_the_parts_cannot_do_is_refused(changes, found, granite, tmp_path):
    with pytest.raises(UserError, match=found):
        describe(open_checkpoint(edit_config(copied(granite, tmp_path), **changes)))


@pytest.mark.parametrize("infinite", [math.inf, {"__float__": "Infinity"}])
def test_a_step_without_a_limit_may_be_said_in_two_ways(infinite, granite, tmp_path):
    folder = copied(granite, tmp_path)
    spec = describe(open_checkpoint(folder))[0]
    edit_config(folder, time_step_limit=[0.0, infinite])
    assert describe(open_checkpoint(folder))[0] == spec


def test_what_a_layer_is_may_be_said_in_two_ways(granite, tmp_path):
    folder = copied(granite, tmp_path)
    spec = describe(open_checkpoint(folder))[0]
    kinds = ["linear_attention", "full_attention"]
    edit_config(folder, remove=("layer_types",), layers_block_type=kinds)
    assert describe(open_checkpoint(folder))[0] == spec


@pytest.fixture(scope="module")
def granite(tmp_path_factory):
    return save_checkpoint(make_model("granitemoehybrid"), tmp_path_factory.mktemp("granite"))


def copied(checkpoint, folder):
    (folder / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    (folder / "model.safetensors").symlink_to(checkpoint / "model.safetensors")
    return folder
