"""Layers that are half of one: what of them is planned, and what a manifest has to have."""

import json

import numpy as np
import pytest
import torch

from ane_moe.conversion.pipeline import plan
from ane_moe.conversion.plan import ConvertOptions
from ane_moe.errors import UserError
from ane_moe.families import describe_config
from ane_moe.json_file import read_json
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from ane_moe.manifest import FILE_NAME
from tests.models import edit_config, make_model, save_checkpoint
from tests.verification.tiny import tiny_conversion

IDS = np.random.default_rng(0).integers(3, 211, 21).tolist()
LAYERS = {0: {"attn"}, 1: {"ffn"}, 2: {"attn"}, 3: {"ffn"}}  # Mamba, experts, attention, an MLP


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    torch.set_num_threads(1)
    model = make_model("nemotron_h")
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0].numpy()
    return save_checkpoint(model, tmp_path_factory.mktemp("nemotron")), expected


def scopes(planned):
    found = {}
    for shard in planned.shards:
        if shard.layer is not None:
            found.setdefault(shard.layer, set()).add(shard.scope)
    return found


def test_a_layer_has_the_shards_of_its_half(original):
    checkpoint, _ = original
    assert scopes(plan(checkpoint, ConvertOptions())) == LAYERS
    sparse = plan(checkpoint, ConvertOptions(routing="sparse"))
    assert scopes(sparse) == LAYERS | {1: {"attn", "ffn"}}
    assert next(shard.kind for shard in sparse.shards if shard.layer == 1) == "routing"


def test_a_shard_that_is_not_there_is_missed(original, tmp_path):
    checkpoint, _ = original
    out = tiny_conversion(checkpoint, tmp_path, prefill=8, context=64)
    manifest = json.loads((out / FILE_NAME).read_text())
    for number in (0, 1, 3):
        shards = [shard for shard in manifest["shards"] if shard["layer"] != number]
        (out / FILE_NAME).write_text(json.dumps(manifest | {"shards": shards}))
        with pytest.raises(UserError, match=f"layer {number} .* is incomplete"):
            load_shards(out, "reference")


def test_squares_are_divided_where_fp16_does_not_hold_them(tmp_path):
    """up by a power of two, and what reads its square by that power's square."""
    model = make_model("nemotron_h")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "up_proj" in name:
                parameter.mul_(256)
            elif "down_proj" in name:
                parameter.mul_(2.0**-16)
        expected = model(torch.tensor([IDS])).logits[0].numpy()
    checkpoint = save_checkpoint(model, tmp_path / "checkpoint")
    sizes = {"prefill": 8, "context": 64}
    out = tiny_conversion(checkpoint, tmp_path / "plain", stream_divisor=1, **sizes)
    with np.errstate(all="ignore"):
        spoiled = Session(load_shards(out, "reference")).prefill_logits(IDS)
    assert not np.isfinite(spoiled).all()
    out = tiny_conversion(checkpoint, tmp_path / "divided", golden=True, **sizes)
    logits = Session(load_shards(out, "reference")).prefill_logits(IDS)
    norms = np.linalg.norm(logits, axis=1) * np.linalg.norm(expected, axis=1)
    assert np.median((logits * expected).sum(1) / norms) > 0.999


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"moe_latent_size": 0}, "moe_latent_size"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"sliding_window": 4}, "sliding_window"),
        ({"n_groups": 4}, "n_groups.*divisor of 6"),
        ({"layers_block_type": ["mamba", "conv"]}, "layers_block_type"),
        ({"layers_block_type": None, "hybrid_override_pattern": "ME*x"}, "hybrid_override_pattern"),
    ],
)
def test_what_the_parts_cannot_do_is_refused(original, changes, found):
    with pytest.raises(UserError, match=found):
        describe_config(read_json(original[0] / "config.json") | changes)


def test_older_files_spell_the_layers_with_letters(original, tmp_path):
    for file in original[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    spec = plan(tmp_path, ConvertOptions()).spec
    edit_config(tmp_path, remove=("layers_block_type",), hybrid_override_pattern="ME*-")
    assert plan(tmp_path, ConvertOptions()).spec == spec
