"""Attention to the tokens that an indexer chooses: to all of a context of no more than it chooses.
Where blocks are chosen, or a layer takes what another one chose, that is the limit; Hugging Face's
own models say that it is one."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from ane_moe.checkpoints.checkpoint import open_checkpoint
from ane_moe.conversion.job import plan_of
from ane_moe.conversion.plan import ConvertOptions
from ane_moe.errors import UserError
from ane_moe.families import describe, describe_config
from ane_moe.families.deepseek_v32 import INDEXERS
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from ane_moe.opened import open_model
from ane_moe.verification.verify import verify
from tests.models import edit_config, make_model, read_config, save_checkpoint, write_config
from tests.torch_model import TorchModel
from tests.verification.tiny import tiny_conversion
from tests.zoo import BLOCKS, LARGE, NOTE

IDS = np.random.default_rng(0).integers(3, 211, 40).tolist()
CHOSEN = 160  # tokens, in the test table
NEAR, FAR = 4e-5, 1e-2
FAMILIES = ("axk2", "deepseek_v32", "glm_moe_dsa", "minimax_m3_vl", "mistral_large4")
LIMITED = ("glm_moe_dsa", "minimax_m3_vl", "mistral_large4")


def fewer(family: str) -> dict:
    """Fields with which 32 tokens are chosen."""
    if family == "minimax_m3_vl":
        return {"text_config": BLOCKS | {"index_topk_blocks": 4}}
    if family == "mistral_large4":
        return {"text_config": LARGE | {"index_topk": 32}}
    return {"index_topk": 32}


def logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_chosen_counts_beyond_the_limit_alone(family, tmp_path):
    all_seen, some_seen = logits(make_model(family)), logits(make_model(family, **fewer(family)))
    ours = TorchModel(save_checkpoint(make_model(family), tmp_path)).logits(IDS)
    assert np.abs(ours - all_seen).max() < NEAR
    off = np.abs(ours - some_seen).max(axis=1)
    assert off[:32].max() < NEAR < FAR < off[32:].max()


@pytest.mark.parametrize("family", LIMITED)
def test_a_context_is_no_longer_than_what_is_chosen(family, tmp_path):
    checkpoint = save_checkpoint(make_model(family), tmp_path / "checkpoint")
    spec, _ = describe(open_checkpoint(checkpoint))
    assert spec.context == CHOSEN
    with pytest.raises(UserError, match=f"own is {CHOSEN}"):
        tiny_conversion(checkpoint, tmp_path / "out", context=CHOSEN + 1)


# Few tokens chosen of 40, by heads enough that scores are hardly ever all zeros.
CHOOSING = {"index_topk": 12, "index_n_heads": 8}
CHOOSERS = {
    "axk2": {},
    "deepseek_v32": {},
    "dots3_note": {"text_config": NOTE | CHOOSING},
    "glm_moe_dsa": {"num_hidden_layers": 2, "indexer_types": ["full", "full"]},
}
WRONG = {
    "one fewer": lambda indexer: {"chosen": indexer.chosen - 1},
    "one more": lambda indexer: {"chosen": indexer.chosen + 1},
    "other pairs": lambda indexer: {"interleaved": not indexer.interleaved},
    "another eps": lambda indexer: {"eps": 0.5},
}


def choosing(family):
    return make_model(family, **CHOOSING | CHOOSERS[family])


def with_indexers(spec, change):
    """The same with each indexer changed."""
    layers = (
        replace(layer, mixer=replace(layer.mixer, indexer=replace(indexer, **change(indexer))))
        if (indexer := layer.mixer.indexer)
        else layer
        for layer in spec.layers
    )
    return replace(spec, layers=tuple(layers))


@pytest.mark.parametrize("family", CHOOSERS)
def test_attention_goes_to_the_tokens_that_are_chosen(family, tmp_path):
    """As many as Hugging Face's indexer takes, and the same; each of its fields counts."""
    model = choosing(family)
    folder = save_checkpoint(model, tmp_path)
    ours, expected = TorchModel(folder), logits(model)
    assert np.abs(ours.logits(IDS) - expected).max() < NEAR
    all_seen = with_indexers(ours.spec, lambda indexer: {"chosen": len(IDS)})
    assert np.abs(expected - TorchModel(folder, all_seen).logits(IDS)).max() > FAR
    for name, change in WRONG.items():
        wrong = TorchModel(folder, with_indexers(ours.spec, change))
        assert np.abs(wrong.logits(IDS) - expected).max() > FAR, name


@pytest.mark.parametrize(
    ("family", "routing"),
    [
        ("deepseek_v32", "masked"),
        *(
            pytest.param(family, routing, marks=pytest.mark.slow)
            for family in CHOOSERS
            for routing in ("masked", "sparse", "stream")
        ),
    ],
)
def test_a_conversion_chooses_as_hugging_face_does(family, routing, tmp_path):
    """Logits by calls of many tokens and of one, beyond what is chosen."""
    model = choosing(family)
    checkpoint = save_checkpoint(model, tmp_path / "checkpoint")
    options = {"expert_tokens": (1, 16)} if routing != "masked" else {}
    out = tiny_conversion(
        checkpoint, tmp_path / "out", routing=routing, prefill=16, context=64, **options
    )
    (tmp_path / "prompts.json").write_text(str([IDS[:12], IDS]))
    report = verify(out, checkpoint=checkpoint, prompts=tmp_path / "prompts.json")
    assert [row for row in report.shards if not row.passed] == []
    assert all(row.passed for row in report.models)
    shards, expected = load_shards(out, "reference"), logits(model)
    for by in ("prefill", "decode"):
        found = Session(shards).prefill_logits(IDS, by)
        norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
        assert np.median((found * expected).sum(1) / norms) > 0.9999
        decided = np.sort(expected)[:, -1] - np.sort(expected)[:, -2] > 0.05
        assert (found.argmax(1) == expected.argmax(1))[decided].mean() > 0.9


@pytest.mark.parametrize(
    ("family", "billions"), [("axk2", 20), ("deepseek_v32", 672), ("glm_moe_dsa", 744)]
)
def test_the_published_models_have_their_sizes_and_choose_2048_tokens(family, billions):
    """Of which the defaults of transformers' own configurations tell."""
    config = AutoConfig.for_model(family)
    spec = describe_config(config.to_dict())
    assert spec.context == config.max_position_embeddings > 2048
    assert {layer.mixer.indexer.chosen for layer in spec.layers} == {2048}
    assert round(sum(math.prod(row.shape) for _, row in spec.weights()) / 1e9) == billions


def test_full_attention_has_the_context_of_the_model(tmp_path):
    config = {"text_config": BLOCKS | {"layer_types": ["full_attention"] * 3}}
    spec, _ = describe(
        open_checkpoint(save_checkpoint(make_model("minimax_m3_vl", **config), tmp_path))
    )
    assert spec.context == BLOCKS["max_position_embeddings"]


@pytest.mark.parametrize("family", FAMILIES)
def test_indexers_are_left_out_by_name(family, tmp_path):
    """Of the layers that have one, which are two of each model, in so short a context."""
    model = open_model(save_checkpoint(make_model(family), tmp_path))
    plan = plan_of(model, ConvertOptions(context=CHOSEN))
    named = plan.source.left_out[INDEXERS]
    assert len({re.search(r"layers\.\d+", name)[0] for name in named}) == 2
    assert all("index" in name for name in named)


def test_the_published_file_of_minimax_m3_says_the_same(tmp_path):
    """Kinds of layers by numbers, and blocks in an object."""
    checkpoint = save_checkpoint(make_model("minimax_m3_vl"), tmp_path)
    saved, config = describe(open_checkpoint(checkpoint))[0], read_config(checkpoint)
    blocks = {"sparse_attention_freq": [0, 1, 1], "sparse_num_index_heads": 2}
    for name in ("block_size", "topk_blocks"):
        blocks[f"sparse_{name}"] = config["text_config"].pop(f"index_{name}")
    for name in ("layer_types", "mlp_layer_types"):
        del config["text_config"][name]
    config["text_config"] |= {"sparse_attention_config": blocks, "moe_layer_freq": [0, 1, 1]}
    config["text_config"] |= {"hidden_act": "swigluoai"}
    write_config(checkpoint, config)
    assert describe(open_checkpoint(checkpoint))[0] == saved


@pytest.mark.parametrize(
    ("field", "value"), [("rope_interleave", False), ("moe_layer_freq", 2), ("q_lora_rank", None)]
)
def test_other_maths_is_refused_by_name(field, value, tmp_path):
    checkpoint = save_checkpoint(make_model("deepseek_v32"), tmp_path)
    edit_config(checkpoint, **{field: value})
    with pytest.raises(UserError, match=field):
        describe(open_checkpoint(checkpoint))


@pytest.mark.parametrize(
    ("field", "value"),
    [("rotary_dim", 16), ("hidden_act", "gelu"), ("sparse_attention_config", [1])],
)
def test_other_maths_of_blocks_is_refused_by_name(field, value, tmp_path):
    checkpoint = save_checkpoint(make_model("minimax_m3_vl"), tmp_path)
    config = read_config(checkpoint)
    config["text_config"][field] = value
    with pytest.raises(UserError, match=field):
        describe_config(config)


def test_closed_groups_that_count_as_zeros_are_refused_by_name():
    values = AutoConfig.for_model("axk2").to_dict() | {"n_group": 4, "topk_group": 2}
    with pytest.raises(UserError, match="n_group"):
        describe_config(values)


def test_older_files_count_dense_layers(tmp_path):
    checkpoint = save_checkpoint(make_model("deepseek_v32"), tmp_path)
    saved = describe(open_checkpoint(checkpoint))[0]
    edit_config(checkpoint, remove=("mlp_layer_types", "layer_types"))
    assert describe(open_checkpoint(checkpoint))[0] == saved


@pytest.mark.parametrize("family", ["axk2", "deepseek_v32"])
def test_an_indexer_needs_the_latents_of_queries(family, tmp_path):
    folder = save_checkpoint(make_model(family), tmp_path)
    edit_config(folder, q_lora_rank=None)
    with pytest.raises(UserError, match="q_lora_rank"):
        describe_config(read_config(folder))
