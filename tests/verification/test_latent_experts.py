"""Experts that work on a latent: whole conversions by every way of calling them, against Hugging
Face's model, and what a plan says of them, by hand."""

import shutil

import numpy as np
import pytest
import torch

from ane_moe.conversion.pipeline import plan
from ane_moe.conversion.plan import ConvertOptions
from ane_moe.formats.recipe import FP16, INT8
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from ane_moe.verification.verify import verify
from tests.models import make_model, save_checkpoint
from tests.verification.tiny import edit_tensors, tiny_conversion

IDS = [np.random.default_rng(seed).integers(3, 211, 24).tolist() for seed in (0, 1)]
WIDTH, LATENT, EXPERT, SHARED = 72, 56, 40, 52
SHAPE = {"moe_latent_size": LATENT, "layers_block_type": ["moe", "full_attention", "moe"]}
CALLED = {"expert_tokens": (1, 16)}
# Options, and the least cosine of logits.
WAYS = {
    "cut": ({"max_shard_mb": 0.1, "prefill": 0}, 0.9999),
    "sparse": ({"routing": "sparse", "experts_per_function": 2, **CALLED}, 0.9999),
    "stream": ({"routing": "stream", "recipe": INT8, **CALLED}, 0.999),
}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    torch.set_num_threads(1)
    model = make_model("nemotron_h", **SHAPE)
    with torch.no_grad():
        expected = model(torch.tensor(IDS[:1])).logits[0].numpy()
    checkpoint = save_checkpoint(model, tmp_path_factory.mktemp("latent") / "checkpoint")
    (checkpoint.parent / "prompts.json").write_text(str(IDS))
    return checkpoint, expected


def cosine(logits, expected):
    """The median over tokens, since a near tie in routing flips a few."""
    norms = np.linalg.norm(logits, axis=1) * np.linalg.norm(expected, axis=1)
    return np.median((logits * expected).sum(1) / norms)


@pytest.mark.parametrize("way", WAYS)
def test_a_conversion_is_right(original, way, tmp_path):
    checkpoint, expected = original
    options, least = WAYS[way]
    out = tiny_conversion(checkpoint, tmp_path, **{"prefill": 16, "context": 64} | options)
    assert verify(out, checkpoint=checkpoint, prompts=checkpoint.parent / "prompts.json").passed
    logits = Session(load_shards(out, "reference")).prefill_logits(IDS[0])
    assert cosine(logits, expected) > least


@pytest.mark.parametrize(
    ("matrix", "factor", "kind"), [("fc1_latent", 0.9, "moe"), ("fc2_latent", 0.5, "join")]
)
def test_a_part_of_a_cut_layer_whose_experts_are_given_too_little_is_noticed(
    original, matrix, factor, kind, tmp_path
):
    """The shared expert is most of what such a layer adds."""
    checkpoint, _ = original
    weaker = shutil.copytree(checkpoint, tmp_path / "weaker")

    def weaken(tensors):
        for name in tensors:
            tensors[name] *= factor if matrix in name else 1

    edit_tensors(weaker, weaken)
    out = tiny_conversion(weaker, tmp_path / "out", max_shard_mb=0.1, prefill=0, context=64)
    report = verify(out, checkpoint=checkpoint, prompts=checkpoint.parent / "prompts.json")
    assert {row.kind for row in report.shards if not row.passed} == {kind}


def test_experts_are_as_wide_as_their_latent_and_what_is_shared_goes_with_their_sum(original):
    planned = plan(original[0], ConvertOptions(routing="sparse", recipe=FP16, context=64))
    routing, experts, join = (shard.functions[0] for shard in planned.shards if shard.layer == 0)
    channels = {
        (port.slot, port.shape[1]) for one in (routing, experts, join) for port in one.ports
    }
    assert channels == {
        ("stream", WIDTH),
        ("ffn_input", LATENT),
        ("added", LATENT),
        ("gates.0", 12),
        ("gates.0", 1),
    }
    assert experts.elements == 2 * LATENT * EXPERT
    shared = 2 * WIDTH * SHARED + SHARED + WIDTH
    assert join.elements == WIDTH + shared + LATENT * WIDTH + WIDTH
    assert all(function.experts for function in planned.shards[1].functions)  # none is shared


def test_sums_in_a_latent_are_divided_where_fp16_does_not_hold_them(tmp_path):
    """The projection out of it makes small again what experts give."""
    model = make_model("nemotron_h", **SHAPE | {"layers_block_type": ["moe", "full_attention"]})
    with torch.no_grad():
        layer = model.model.layers[0].mixer
        layer.experts.down_proj.mul_(2.0**17)
        layer.fc2_latent_proj.weight.mul_(2.0**-11)
        expected = model(torch.tensor(IDS[:1])).logits[0].numpy()
    checkpoint = save_checkpoint(model, tmp_path / "checkpoint")
    sizes = {"context": 64, "routing": "sparse", "expert_tokens": (1,)}
    for name, options, holds in (
        ("plain", {"stream_divisor": 1}, False),
        ("divided", {"golden": True}, True),
    ):
        out = tiny_conversion(checkpoint, tmp_path / name, **sizes, **options)
        with np.errstate(all="ignore"):
            logits = Session(load_shards(out, "reference")).prefill_logits(IDS[0])
        assert bool(np.isfinite(logits).all()) == holds
    assert cosine(logits, expected) > 0.9999
