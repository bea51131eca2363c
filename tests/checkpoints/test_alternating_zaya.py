"""ZAYA1 in its first form, against the same model in transformers' form."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ane_moe.checkpoints.checkpoint import open_checkpoint
from ane_moe.errors import UserError
from ane_moe.families import describe
from ane_moe.formats.recipe import INT8
from ane_moe.original.capture import capture_golden
from ane_moe.original.golden import read_golden
from ane_moe.verification.verify import verify
from tests.models import make_model, read_config, save_checkpoint, write_config
from tests.verification.tiny import tiny_conversion

# transformers' name in a layer -> (the layer of the pair, the file's name in it), written out from
# the conversion script's documentation: 0 is attention, 1 the experts, 2 attention of the next
# pair.
HOME = {
    "input_layernorm.weight": (0, "input_norm.weight"),
    "post_attention_layernorm.weight": (1, "input_norm.weight"),
    "self_attn.qk_norm.temp": (0, "self_attn.qkv.temp"),
    "self_attn.o_proj.weight": (0, "self_attn.o_proj.weight"),
    "self_attn.qkv_proj.q_proj.weight": (0, "self_attn.qkv.linear_q.weight"),
    "self_attn.qkv_proj.k_proj.weight": (0, "self_attn.qkv.linear_k.weight"),
    "self_attn.qkv_proj.v_proj_current.weight": (0, "self_attn.qkv.val_proj1.weight"),
    "self_attn.qkv_proj.v_proj_delayed.weight": (0, "self_attn.qkv.val_proj2.weight"),
    **{
        f"self_attn.qkv_proj.conv_qk_depthwise.{kind}": (0, f"self_attn.qkv.conv_qk.0.{kind}")
        for kind in ("weight", "bias")
    },
    **{
        f"self_attn.qkv_proj.conv_qk_grouped.{kind}": (0, f"self_attn.qkv.conv_qk.1.{kind}")
        for kind in ("weight", "bias")
    },
    "mlp.gate.router_mlp.norm.weight": (1, "zaya_block.router.rmsnorm_eda.weight"),
    **{
        f"mlp.gate.router_mlp.{name}.{kind}": (1, f"zaya_block.router.router_mlp.{place}.{kind}")
        for name, place in (("fc1", 0), ("fc2", 2))
        for kind in ("weight", "bias")
    },
    "mlp.gate.router_mlp.out_proj.weight": (1, "zaya_block.router.router_mlp.4.weight"),
    **{
        f"mlp.gate.down_proj.{kind}": (1, f"zaya_block.router.down_proj.{kind}")
        for kind in ("weight", "bias")
    },
    "mlp.gate.router_states_scale": (1, "zaya_block.router.router_states_scale"),
    "mlp.gate.balancing_biases": (1, "zaya_block.router.balancing_biases"),
    **{
        f"post_attention_residual_scale.{vector}": (1, f"res_scale.{vector}")
        for vector in (
            "hidden_states_scale",
            "hidden_states_bias",
            "residual_scale",
            "residual_bias",
        )
    },
    **{
        f"post_mlp_residual_scale.{vector}": (2, f"res_scale.{vector}")
        for vector in (
            "hidden_states_scale",
            "hidden_states_bias",
            "residual_scale",
            "residual_bias",
        )
    },
}


def alternating(tensors: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """The tensors of a model in transformers' form under the names of the first form."""
    made: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith("model.input_"):
            made[f"model.layers.0.res_scale.{name.removeprefix('model.input_')}"] = tensor
            continue
        if not name.startswith("model.layers."):
            made[name] = tensor
            continue
        _, _, number, rest = name.split(".", 3)
        first = 2 * int(number)
        if rest.startswith("mlp.experts."):
            half = 1 if rest.endswith("gate_up_proj") else 2
            for expert, matrix in enumerate(tensor):
                key = f"model.layers.{first + 1}.zaya_block.experts.local_experts.{expert}.linear_fc{half}.weight"
                made[key] = matrix
            continue
        offset, theirs = HOME[rest]
        at = first + offset
        made[f"model.layers.{at}.{theirs}" if at < 2 * layers else f"model.{theirs}"] = tensor
    return made


def first_config(config: dict[str, Any]) -> dict[str, Any]:
    """As ZAYA1-8B-legacy has it."""
    kept = (
        "model_type",
        "vocab_size",
        "hidden_size",
        "num_attention_heads",
        "head_dim",
        "num_experts",
        "max_position_embeddings",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "dtype",
    )
    return {name: config[name] for name in kept} | {
        "num_hidden_layers": 2 * config["num_hidden_layers"],
        "num_query_groups": config["num_key_value_heads"],
        "ffn_hidden_size": 2 * config["moe_intermediate_size"],
        "moe_router_topk": 1,
        "norm_epsilon": 1e-5,
        "zaya_mlp_expansion": [0, config["router_hidden_size"]] * config["num_hidden_layers"],
        "activation_func": "swiglu",
        "rope_theta": 5000000.0,
        "swa_rotary_base": 10000.0,
        "swa_layers": [0, 0, 16, 0, 0, 0],
        "add_bias_linear": False,
        "rope_scaling": None,
    }


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same model in both forms."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("zaya")
    native = save_checkpoint(make_model("zaya"), folder / "native")
    first = folder / "first"
    first.mkdir()
    tensors = alternating(load_file(native / "model.safetensors"), 3)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        first / "model.safetensors",
        {"format": "pt"},
    )
    (first / "config.json").write_text(json.dumps(first_config(read_config(native))))
    return native, first


def test_both_forms_are_one_model(forms: tuple[Path, Path]) -> None:
    checkpoints = [open_checkpoint(folder) for folder in forms]
    (spec, sources), (other, others) = map(describe, checkpoints)
    assert other == spec
    assert [layer.mixer.window for layer in spec.layers] == [None, 17, None]
    assert list(sources) == list(others)
    for name, source in sources.items():
        read = [
            checkpoint.read(each)
            for checkpoint, each in zip(checkpoints, (source, others[name]), strict=True)
        ]
        assert np.array_equal(*read), name
    assert any("layers of their own" in note for note in checkpoints[1].notes)


def test_hugging_face_computes_the_same_of_both(forms: tuple[Path, Path], tmp_path: Path) -> None:
    goldens = []
    for folder in forms:
        out = tmp_path / f"{folder.name}.safetensors"
        capture_golden(
            open_checkpoint(folder),
            layers=(0, 1, 2),
            prompts=[[5, 9, 3, 40, 7, 8]],
            out=out,
            experts=True,
        )
        goldens.append(read_golden(out))
    assert np.array_equal(goldens[0].logits, goldens[1].logits)
    assert np.array_equal(goldens[0].layers[1].expert_outputs, goldens[1].layers[1].expert_outputs)


def test_a_compressed_conversion_of_the_first_form_is_proved(
    forms: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tiny_conversion(
        forms[1], tmp_path / "out", recipe=INT8, prefill=16, context=64, golden=True
    )
    report = verify(out)
    assert report.passed and report.as_stored is not None


def test_an_odd_number_of_layers_is_refused(forms: tuple[Path, Path]) -> None:
    folder = forms[1]
    config = read_config(folder)
    try:
        write_config(folder, config | {"num_hidden_layers": 5})
        with pytest.raises(UserError, match=r"even in number.*5"):
            open_checkpoint(folder)
    finally:
        write_config(folder, config)


def test_a_tensor_it_does_not_know_is_named(forms: tuple[Path, Path], tmp_path: Path) -> None:
    _, first = forms
    (tmp_path / "config.json").write_text((first / "config.json").read_text())
    tensors = load_file(first / "model.safetensors")
    save_file(
        tensors | {"model.layers.3.zaya_block.other.weight": torch.ones(3)},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(UserError, match=r"other\.weight"):
        describe(open_checkpoint(tmp_path))
