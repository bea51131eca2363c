"""Every way of getting an architecture slightly wrong, alone, makes verify fail; the right
conversion passes.

The golden always comes from the true checkpoint, the shards from one with a single thing changed.
"""

import dataclasses
import shutil

import pytest

from ane_moe.verification.verify import verify
from tests.models import edit_config
from tests.verification.tiny import describe_wrongly, edit_tensors, tiny_checkpoint, tiny_conversion

PROMPTS = [[7, 3, 11, 50, 2, 9, 33, 33, 18, 4, 25, 60, 1, 0, 44, 12], [5], [40, 41, 42, 43]]
EXPERT = "model.layers.0.mlp.experts.{}.{}_proj.weight"


@pytest.fixture(scope="module")
def true_checkpoint(tmp_path_factory):
    """The path of a family's true checkpoint. Its embeddings are so small that the norm's eps
    matters, its queries so large that attention is not uniform."""
    folder = tmp_path_factory.mktemp("true")

    def get(family):
        path = folder / family
        if not path.exists():
            tiny_checkpoint(family, path)
            edit_tensors(path, sharpen)
        return path

    return get


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(str(PROMPTS))
    return path


def sharpen(tensors):
    tensors["model.embed_tokens.weight"] *= 0.1
    tensors["model.layers.0.self_attn.q_proj.weight"] *= 10


def rotate_neighbours(tensors):
    """What half-split RoPE does to these rows is what interleaved RoPE does to the true ones."""
    for name in ("q", "k"):
        key = f"model.layers.0.self_attn.{name}_proj.weight"
        heads = tensors[key].unflatten(0, (-1, 8, 2))
        tensors[key] = heads.transpose(1, 2).flatten(0, 2)


def swap_experts(tensors):
    for name in ("gate", "up", "down"):
        first, second = EXPERT.format(0, name), EXPERT.format(1, name)
        tensors[first], tensors[second] = tensors[second], tensors[first]


def transpose_experts(tensors):
    for expert in range(4):
        key = EXPERT.format(expert, "up")
        tensors[key] = tensors[key].T


def swap_gate_and_up(tensors):
    for expert in range(4):
        gate, up = EXPERT.format(expert, "gate"), EXPERT.format(expert, "up")
        tensors[gate], tensors[up] = tensors[up], tensors[gate]


CONFIG_MUTATIONS = {
    "renormalisation flipped": ("qwen3_moe", {"norm_topk_prob": False}, "moe"),
    "another eps": ("qwen3_moe", {"rms_norm_eps": 1e-5}, "attn"),
    "another number of experts per token": ("mixtral", {"num_experts_per_tok": 1}, "moe"),
    "residual multiplier": ("granitemoe", {"residual_multiplier": 0.25}, "moe"),
    "attention multiplier": ("granitemoe", {"attention_multiplier": 16**-0.5}, "attn"),
    "embedding multiplier": ("granitemoe", {"embedding_multiplier": 11.0}, "embed"),
    "logits scaling": ("granitemoe", {"logits_scaling": 5.0}, "lm_head"),
}
TENSOR_MUTATIONS = {
    "interleaved rope": ("mixtral", rotate_neighbours, "attn"),
    "expert order": ("qwen3_moe", swap_experts, "moe"),
    "transposed experts": ("qwen3_moe", transpose_experts, "moe"),
    "gate and up swapped": ("qwen3_moe", swap_gate_and_up, "moe"),
}


def failing_kinds(out, true, prompts):
    report = verify(out, checkpoint=true, prompts=prompts)
    assert not report.integrity
    assert report.passed == (not any(not row.passed for row in (*report.shards, *report.models)))
    return {row.kind for row in report.shards if not row.passed}


@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoe", "mixtral"])
def test_the_unchanged_conversion_passes(family, true_checkpoint, prompts, tmp_path):
    true = true_checkpoint(family)
    assert failing_kinds(tiny_conversion(true, tmp_path / "out"), true, prompts) == set()


@pytest.mark.parametrize("name", CONFIG_MUTATIONS)
def test_a_wrong_setting_fails_the_shards_it_is_part_of(name, true_checkpoint, prompts, tmp_path):
    family, change, kind = CONFIG_MUTATIONS[name]
    true = true_checkpoint(family)
    wrong = edit_config(shutil.copytree(true, tmp_path / "wrong"), **change)
    assert kind in failing_kinds(tiny_conversion(wrong, tmp_path / "out"), true, prompts)


@pytest.mark.parametrize("name", TENSOR_MUTATIONS)
def test_a_wrong_tensor_map_fails_the_shards_it_is_part_of(
    name, true_checkpoint, prompts, tmp_path
):
    family, change, kind = TENSOR_MUTATIONS[name]
    true = true_checkpoint(family)
    wrong = shutil.copytree(true, tmp_path / "wrong")
    edit_tensors(wrong, change)
    assert failing_kinds(tiny_conversion(wrong, tmp_path / "out"), true, prompts) == {kind}


def test_attention_without_its_q_and_k_norms_fails(true_checkpoint, prompts, tmp_path, monkeypatch):
    def without_norms(spec):
        layers = tuple(
            dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, qk_norm="none"))
            for layer in spec.layers
        )
        return dataclasses.replace(spec, layers=layers)

    true = true_checkpoint("qwen3_moe")
    describe_wrongly(monkeypatch, without_norms)
    assert failing_kinds(tiny_conversion(true, tmp_path / "out"), true, prompts) == {"attn"}
