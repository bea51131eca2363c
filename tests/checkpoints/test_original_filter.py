"""The privacy filter as it was first stored, against transformers' model of the same weights.

The names, the fused queries, keys and values, and the sinks as powers of 2 are those that
transformers' convert_openai_privacy_filter_weights_to_hf.py reads.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ane_moe.checkpoints.checkpoint import Checkpoint, open_checkpoint
from ane_moe.checkpoints.original_filter import LABELS
from ane_moe.demo import privacy_checkpoint
from ane_moe.errors import UserError
from ane_moe.families import describe
from ane_moe.loop.labels import Labeller
from ane_moe.loop.shards import load_shards
from ane_moe.manifest import read_manifest
from ane_moe.verification.verify import verify
from tests.models import make_model, save_checkpoint
from tests.verification.tiny import tiny_conversion

NAMES = {
    "model.embed_tokens.weight": "embedding.weight",
    "model.norm.weight": "norm.scale",
    "score.weight": "unembedding.weight",
    "input_layernorm.weight": "attn.norm.scale",
    "self_attn.o_proj.weight": "attn.out.weight",
    "self_attn.o_proj.bias": "attn.out.bias",
    "post_attention_layernorm.weight": "mlp.norm.scale",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.bias": "mlp.gate.bias",
    "mlp.experts.gate_up_proj": "mlp.swiglu.weight",
    "mlp.experts.gate_up_proj_bias": "mlp.swiglu.bias",
    "mlp.experts.down_proj": "mlp.out.weight",
    "mlp.experts.down_proj_bias": "mlp.out.bias",
}
BUILT_IN = {"swiglu_limit": 7.0, "swiglu_alpha": 1.702}  # not in the first form's config.json


def make_filter(**overrides: Any) -> PreTrainedModel:
    names = {number: label for number, label in enumerate(LABELS)}
    fields = {"num_hidden_layers": 2, "id2label": names, **BUILT_IN, **overrides}
    model = make_model("openai_privacy_filter", **fields)
    with torch.no_grad():
        model.score.bias.zero_()
    return model


def save_original(model: PreTrainedModel, folder: Path, **changes: Any) -> Path:
    """The model in its first form."""
    config, state, tensors = model.config, dict(model.state_dict()), {}
    for layer in range(config.num_hidden_layers):
        theirs, ours = f"block.{layer}.", f"model.layers.{layer}."
        for kind in ("weight", "bias"):
            each = [state.pop(f"{ours}self_attn.{letter}_proj.{kind}") for letter in "qkv"]
            tensors[f"{theirs}attn.qkv.{kind}"] = torch.cat(each)
        tensors[f"{theirs}attn.sinks"] = state.pop(f"{ours}self_attn.sinks") / math.log(2)
    state.pop("score.bias")
    for name, tensor in state.items():
        parts = name.split(".", 3)
        layered = name.startswith("model.layers.")
        tensors[f"block.{parts[2]}.{NAMES[parts[3]]}" if layered else NAMES[name]] = tensor
    folder.mkdir(exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    rope = config.rope_parameters
    values = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_experts": config.num_local_experts,
        "experts_per_token": config.num_experts_per_tok,
        "head_dim": config.head_dim,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "bidirectional_left_context": config.sliding_window,
        "bidirectional_right_context": config.sliding_window,
        "initial_context_length": rope["original_max_position_embeddings"],
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": rope["rope_theta"],
        "rope_scaling_factor": rope["factor"],
        "rope_ntk_beta": rope["beta_fast"],
        "rope_ntk_alpha": rope["beta_slow"],
    }
    (folder / "config.json").write_text(json.dumps({**values, **changes}))
    return folder


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.set_num_threads(1)
    return make_filter()


@pytest.fixture(scope="module")
def original(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_original(model, tmp_path_factory.mktemp("original"))


def read_all(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    _, sources = describe(checkpoint)
    return {str(name): checkpoint.read(source) for name, source in sources.items()}


def test_both_forms_are_one_model(model: PreTrainedModel, original: Path, tmp_path: Path) -> None:
    saved = open_checkpoint(save_checkpoint(model, tmp_path))
    first = open_checkpoint(original)
    ours, theirs = describe(first)[0], describe(saved)[0]
    assert ours.layers == theirs.layers and ours.ropes == theirs.ropes and ours.head == theirs.head
    assert any("first form" in note for note in first.notes)
    read, expected = read_all(first), read_all(saved)
    assert read.keys() == expected.keys()
    for name, value in expected.items():
        if name.endswith("sinks.weight"):  # rounded twice: as powers of 2, and back
            np.testing.assert_allclose(read[name], value, rtol=1e-3)
        else:
            assert np.array_equal(read[name], value), name


def test_the_first_form_is_converted_and_proved(
    model: PreTrainedModel, original: Path, tmp_path: Path
) -> None:
    biases = original / "viterbi_calibration.json"
    biases.write_text('{"operating_points": {}}')
    out = tiny_conversion(original, tmp_path / "out", lengths=(24,), golden=True)
    assert verify(out).passed
    assert (out / biases.name).read_bytes() == biases.read_bytes()
    assert biases.name in read_manifest(out).files
    assert verify(out, checkpoint=original).passed
    labeller = Labeller(load_shards(out, "reference"))
    assert labeller.labels == LABELS
    ids = np.random.default_rng(1).integers(3, 211, 24).tolist()
    logits = labeller.logits(ids)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    norms = np.linalg.norm(logits, axis=1) * np.linalg.norm(expected, axis=1)
    assert np.quantile((logits * expected).sum(1) / norms, 0.1) > 0.9999


def test_tokenizer_and_biases_come_from_the_repository_above(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    repository = save_checkpoint(model, tmp_path / "repository")
    shutil.copy(privacy_checkpoint() / "tokenizer.json", repository)
    (repository / "viterbi_calibration.json").write_text('{"operating_points": {}}')
    for folder, kept in (("original", True), ("other", False)):
        out = tmp_path / folder
        tiny_conversion(save_original(model, repository / folder), out, lengths=(24,))
        assert ("tokenizer.json" in read_manifest(out).files) == kept
        assert ("viterbi_calibration.json" in read_manifest(out).files) == kept


def test_a_band_of_two_widths_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    folder = save_original(model, tmp_path, bidirectional_right_context=6)
    with pytest.raises(UserError, match="as far to the left as to the right"):
        open_checkpoint(folder)


@pytest.mark.parametrize("field", ["rope_theta", "head_dim", "num_experts", "hidden_size"])
def test_a_field_that_is_missing_is_named(
    field: str, model: PreTrainedModel, tmp_path: Path
) -> None:
    folder = save_original(model, tmp_path)
    values = json.loads((folder / "config.json").read_text())
    del values[field]
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=field):
        describe(open_checkpoint(folder))


def test_an_unknown_tensor_is_left_over(model: PreTrainedModel, original: Path) -> None:
    checkpoint = open_checkpoint(original)
    checkpoint.tensors["block.0.attn.other"] = next(iter(checkpoint.tensors.values()))
    with pytest.raises(UserError, match=r"block\.0\.attn\.other"):
        describe(checkpoint)
