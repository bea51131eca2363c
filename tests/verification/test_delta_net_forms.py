"""Conversions of delta nets and lightning attention in their other forms: states that are passed, tokens before the
last axis, layers that share a shard, tensors beside the language model."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ane_moe.checkpoints.checkpoint import open_checkpoint
from ane_moe.errors import UserError
from ane_moe.families import describe
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from ane_moe.placement.predicted import predict
from ane_moe.placement.targets import find_target
from tests.models import edit_config, make_model, save_checkpoint
from tests.placement.test_placement_shards import EXPECTED, packages_in
from tests.slow_set import slow_but
from tests.verification.tiny import tiny_conversion

IDS = np.random.default_rng(0).integers(3, 211, 21).tolist()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save_checkpoint(make_model("qwen3_next"), tmp_path_factory.mktemp("delta"))


@pytest.mark.parametrize(
    "family", ["qwen3_next", "kimi_linear", *slow_but([], ["bailing_hybrid", "minimax"])]
)
def test_another_form_of_a_conversion_computes_the_same(family, tmp_path):
    """Prefill in calls of 8, the last of them padded, then decode: both go on from one state."""
    model = make_model(family)
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0].numpy()
    checkpoint = save_checkpoint(model, tmp_path / "checkpoint")
    form = {"state": "explicit", "layout": "bct1", "layers_per_shard": 2}
    out = tiny_conversion(checkpoint, tmp_path / "out", prefill=8, context=64, **form)
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
    ("field", "value"),
    [
        ("linear_num_key_heads", 3),
        ("linear_num_value_heads", 4),
        ("linear_key_head_dim", 64),
        ("linear_value_head_dim", 24),
        ("linear_conv_kernel_dim", 3),
    ],
)
def test_a_size_that_is_not_the_tensors_is_an_error(original, field, value, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in original.iterdir():
        (folder / file.name).symlink_to(file) if file.suffix == ".safetensors" else (
            folder / file.name
        ).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="wrong shape"):
        describe(open_checkpoint(edit_config(folder, **{field: value})))


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"linear_key_head_dim": 40}, "linear_key_head_dim.*multiple of 32"),
        ({"linear_num_value_heads": 5}, "linear_num_value_heads.*multiple of 2"),
        ({"attention_bias": True}, "attention_bias"),
        ({"layer_types": ["linear_attention", "sliding_attention"]}, "layer_types"),
    ],
)
def test_what_the_parts_cannot_do_is_refused(original, changes, found, tmp_path):
    (tmp_path / "config.json").write_bytes((original / "config.json").read_bytes())
    (tmp_path / "model.safetensors").symlink_to(original / "model.safetensors")
    with pytest.raises(UserError, match=found):
        describe(open_checkpoint(edit_config(tmp_path, **changes)))


def test_older_files_give_an_interval_in_place_of_layer_types(original, tmp_path):
    spec = describe(open_checkpoint(original))[0]
    (tmp_path / "config.json").write_bytes((original / "config.json").read_bytes())
    (tmp_path / "model.safetensors").symlink_to(original / "model.safetensors")
    edit_config(tmp_path, remove=("layer_types",), full_attention_interval=2)
    assert describe(open_checkpoint(tmp_path))[0] == spec


def test_towers_and_heads_for_further_tokens_are_left_out(tmp_path):
    """And a norm's multiplier is 1 plus what is stored, but for the one inside a delta net."""
    model = make_model("qwen3_5_moe")
    checkpoint = open_checkpoint(save_checkpoint(model, tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["mtp.layers.0.input_layernorm.weight"] = torch.ones(72)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    _, sources = describe(checkpoint)
    left = checkpoint.left_out(sources)
    assert set(left) == {"heads that predict further tokens", "a vision tower"}
    values = {str(name): checkpoint.read(source) for name, source in sources.items()}
    layer = model.model.language_model.layers[0]
    stored = layer.input_layernorm.weight.detach()
    assert np.array_equal(values["layers.0.attn.norm.weight"], (stored + 1).half().numpy())
    plain = layer.linear_attn.norm.weight.detach()
    assert np.array_equal(values["layers.0.attn.value_norm.weight"], plain.half().numpy())
