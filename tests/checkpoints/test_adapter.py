"""Adapters merged while weights are read, against peft's own merge."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from ane_moe.checkpoints import adapter as adapter_module
from ane_moe.checkpoints.adapter import WEIGHTS, open_adapter
from ane_moe.checkpoints.safetensors_header import read_header
from ane_moe.checkpoints.stored_tensor import StoredTensor
from ane_moe.conversion.plan import sources_of
from ane_moe.errors import UserError
from ane_moe.families import describe_config
from ane_moe.families.adapters import adapted
from ane_moe.opened import open_model
from ane_moe.original.afm import AfmForCausalLM
from tests.adapters import LINEARS, adapt
from tests.forecast.hub_configs import AFM
from tests.models import make_model, save_checkpoint, save_fused
from tests.test_cli import ane_moe

ULP = 2**-11  # of fp16, relative; the two sum up in another order
EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
# What is adapted: the family, how it is stored, what of it.
CASES = {
    "every linear map": ("qwen3_moe", save_checkpoint, {}),
    "experts that are stored in a stack": ("qwen3_moe", save_fused, {}),
    "rslora": ("qwen3_moe", save_checkpoint, {"use_rslora": True}),
    "ranks of modules": (
        "qwen3_moe",
        save_checkpoint,
        {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"1.self_attn.v_proj": 20}},
    ),
    "one of two parameters": ("qwen3_moe", save_fused, {"target_modules": ["down_proj"]}),
    "other names in the file": (
        "mixtral",
        save_checkpoint,
        {"target_modules": ["q_proj", "w1", "w2", "w3"]},
    ),
    "the head, and a table of its own": (
        "mixtral",
        save_checkpoint,
        {"target_modules": ["o_proj", "lm_head"], "modules_to_save": ["embed_tokens"]},
    ),
    "routers too": ("olmoe", save_checkpoint, {"target_modules": "all-linear"}),
    "turned and interleaved experts": (
        "gpt_oss",
        save_checkpoint,
        {"target_modules": ["q_proj"], **EXPERTS},
    ),
    "rotated in pairs": ("afm", save_checkpoint, {}),
}


def weights_of(folder: Path, *adapters: Path) -> dict[str, np.ndarray]:
    model = open_model(folder, adapters=adapters)
    read = ((name, model.checkpoint.read(source)) for name, source in model.sources.items())
    return {str(name): weight.astype(np.float32) for name, weight in read}


def furthest(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """The largest difference of two weights, by the largest number of its tensor."""
    assert a.keys() == b.keys()
    return max(float(np.abs(a[name] - b[name]).max() / np.abs(b[name]).max()) for name in a)


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_that_peft_merges(case: str, tmp_path: Path) -> None:
    family, save, settings = CASES[case]
    base = save(make_model(family), tmp_path / "base")
    whole = adapt(make_model(family), tmp_path / "adapter", **settings)
    expected = weights_of(save(whole.merge_and_unload(), tmp_path / "merged"))
    assert furthest(weights_of(base, tmp_path / "adapter"), expected) < ULP
    assert furthest(weights_of(base), expected) > 0.1


def test_adapters_of_experts_one_by_one_are_those_of_the_stack(tmp_path: Path) -> None:
    """As files of peft before transformers 5 have them, which peft itself brings together."""
    base = save_checkpoint(make_model("mixtral"), tmp_path / "base")
    adapt(make_model("mixtral"), tmp_path / "old", target_modules=["q_proj"])
    file, config = tmp_path / "old" / WEIGHTS, tmp_path / "old" / "adapter_config.json"
    tensors = load_file(file)
    sizes = {"w1": (56, 72), "w2": (72, 56), "w3": (56, 72)}
    for layer, expert, name in ((n, e, w) for n in range(3) for e in range(5) for w in sizes):
        rows, columns = sizes[name]
        stem = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(4, columns) / 8
        tensors[f"{stem}.lora_B.weight"] = torch.randn(rows, 4) / 8
    save_file(tensors, file, {"format": "pt"})
    said = json.loads(config.read_text())
    config.write_text(json.dumps(said | {"target_modules": ["q_proj", *sizes]}))
    whole = PeftModel.from_pretrained(make_model("mixtral"), tmp_path / "old")
    merged = save_checkpoint(whole.merge_and_unload(), tmp_path / "merged")
    assert furthest(weights_of(base, tmp_path / "old"), weights_of(merged)) < ULP
    stacked = save_fused(make_model("mixtral"), tmp_path / "stacked")
    assert furthest(weights_of(stacked, tmp_path / "old"), weights_of(merged)) < ULP


def test_several_adapters_add_up(tmp_path: Path) -> None:
    base = save_checkpoint(make_model("mixtral"), tmp_path / "base")
    one = adapt(make_model("mixtral"), tmp_path / "one", target_modules=["q_proj", "w2"])
    adapt(make_model("mixtral"), tmp_path / "two", 1, target_modules=["q_proj", "w2"], r=2)
    one.load_adapter(tmp_path / "two", "two")
    one.base_model.set_adapter(["default", "two"])
    merged = save_checkpoint(one.merge_and_unload(), tmp_path / "merged")
    found = weights_of(base, tmp_path / "one", tmp_path / "two")
    assert furthest(found, weights_of(merged)) < ULP


# -- what is wrong is seen -------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_checkpoint(make_model("mixtral"), tmp_path / "base")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    adapt(make_model("mixtral"), tmp_path / "poet", target_modules=["q_proj", "w2"])
    return tmp_path / "poet"


def say(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def changed_alpha(folder: Path) -> None:
    say(folder, lora_alpha=7)


def root_for_rank(folder: Path) -> None:
    say(folder, use_rslora=True)


def experts_by_rank(folder: Path) -> None:
    """Columns of B expert by expert, in place of rank by rank."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("experts.lora_B.weight"):
                turned = tensor.reshape(len(tensor), 4, 5).transpose(1, 2)
                tensors[name] = turned.reshape(tensor.shape).contiguous()

    edit(folder, change)


@pytest.mark.parametrize("mutation", [changed_alpha, root_for_rank, experts_by_rank])
def test_another_scale_or_order_gives_other_weights(mutation, base, folder) -> None:
    expected = weights_of(base, folder)
    mutation(folder)
    assert furthest(weights_of(base, folder), expected) > 0.01


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def swapped(tensors: dict[str, torch.Tensor]) -> None:
    a, b = tensors.pop(f"{Q}.lora_A.weight"), tensors.pop(f"{Q}.lora_B.weight")
    tensors |= {f"{Q}.lora_A.weight": b.T.contiguous(), f"{Q}.lora_B.weight": a.T.contiguous()}


def renamed(old: str, new: str):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def added(name: str, *shape: int):
    return lambda tensors: tensors.update({f"base_model.model.{name}": torch.zeros(shape)})


WRONG = {
    "another rank": ({"r": 8}, None, "does not fit adapter_config.json; found: .*rank 8"),
    "no number": ({"lora_alpha": "x"}, None, "lora_alpha is no number"),
    "DoRA": ({"use_dora": True}, None, "use_dora True; merge it with peft"),
    "biases": ({"bias": "all"}, None, "bias 'all'"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, None, "pissa"),
    "another method": ({"peft_type": "IA3"}, None, "peft_type 'IA3'"),
    "A and B swapped": ({}, swapped, "adapts 1 module that .*0.self_attn.q_proj"),
    "another layer": ({}, renamed("layers.2.", "layers.7."), "adapts 2 modules.*layers.7"),
    "another module": ({}, renamed("q_proj", "query"), "adapts 3 modules.*query"),
    "another model": ({}, renamed("model.layers", "transformer.h"), "adapts 6 modules"),
    "half a pair": ({}, lambda t: t.pop(f"{Q}.lora_A.weight"), "without the other one"),
    "no pair": ({}, lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(3, 72)}), "no pair"),
    "an embedding": ({}, added("model.embed_tokens.lora_embedding_A", 4, 9), "without the other"),
    "a bias": ({}, added("model.layers.0.self_attn.q_proj.bias", 64), "of its own"),
    "a part of another size": ({}, added("model.norm.weight", 7), r"\[7\] for \[72\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_used_is_refused(case: str, base: Path, folder: Path) -> None:
    fields, change, message = WRONG[case]
    say(folder, **fields)
    if change:
        edit(folder, change)
    with pytest.raises(UserError, match=message) as raised:
        open_model(base, adapters=[folder])
    assert "\n" not in str(raised.value)


def test_head_and_embedding_that_are_one_tensor_are_not_adapted(tmp_path: Path) -> None:
    base = save_checkpoint(make_model("mixtral", tie_word_embeddings=True), tmp_path / "base")
    adapt(make_model("mixtral"), tmp_path / "adapter", target_modules=["lm_head"])
    with pytest.raises(UserError, match="one tensor here"):
        open_model(base, adapters=[tmp_path / "adapter"])


def test_a_folder_without_an_adapter_is_called_so(base: Path) -> None:
    with pytest.raises(UserError, match=r"is not an adapter; found: no adapter_config.json"):
        open_model(base, adapters=[base])


# -- sizes -----------------------------------------------------------------------------------


def test_no_more_than_a_part_of_a_matrix_is_merged_at_once(base, folder, monkeypatch) -> None:
    """Rows come by the million elements; thin matrices are what is read whole."""
    asked: list[int] = []
    real = adapter_module.Merged.rows

    def rows(self, first: int, last: int) -> np.ndarray:
        asked.append((last - first) * self.columns)
        return real(self, first, last)

    monkeypatch.setattr("ane_moe.checkpoints.coded.DECODED_ELEMENTS", 1000)
    expected = weights_of(base, folder)
    monkeypatch.setattr(adapter_module.Merged, "rows", rows)
    assert furthest(weights_of(base, folder), expected) == 0
    assert max(asked) <= 1000


def test_an_adapter_of_the_published_sizes_has_the_published_parameters(tmp_path: Path) -> None:
    """66,633,728 of rank 32, of an analysis of Apple's adapter toolkit; no weights are made."""
    fields = {name: value for name, value in AFM.items() if name != "model_type"}
    with torch.device("meta"):
        reference = AfmForCausalLM(AfmForCausalLM.config_class(**fields))
    settings = LoraConfig(r=32, lora_alpha=16, target_modules=LINEARS)
    whole = get_peft_model(reference, settings, low_cpu_mem_usage=True)
    named = {name.replace(".default", ""): one for name, one in whole.named_parameters()}
    thin = {name: tuple(one.shape) for name, one in named.items() if ".lora_" in name}
    assert sum(map(math.prod, thin.values())) == 66_633_728
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 32, "lora_alpha": 16})
    )
    save_file({}, tmp_path / WEIGHTS)
    assert not read_header(tmp_path / WEIGHTS)
    header = {
        name: StoredTensor(name, tmp_path / WEIGHTS, "F16", shape, 0, 2 * math.prod(shape))
        for name, shape in thin.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter_module, "read_header", lambda _: header)
        adapter = open_adapter(tmp_path)
    spec = describe_config(AFM)
    low_ranks = adapted(adapter, spec, sources_of(spec))
    assert adapter.count == 66_633_728 and len(low_ranks) == 35 * 7 + 21 * 5
    assert {low_rank.scale for low_rank in low_ranks.values()} == {0.5}
    assert not any(
        re.search(r"\d+\.attn\.[kv]", str(name)) for name in low_ranks if name.layer > 34
    )


# -- the command line ------------------------------------------------------------------------


def test_a_wrong_adapter_ends_in_one_line(base: Path, folder: Path, tmp_path: Path) -> None:
    say(folder, r=8)
    ended = ane_moe("convert", base, tmp_path / "out", "--adapter", folder)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert "does not fit adapter_config.json" in ended.stderr


def test_a_dry_run_says_that_an_adapter_is_merged(base: Path, folder: Path, tmp_path: Path) -> None:
    ended = ane_moe("convert", base, tmp_path / "out", "--adapter", folder, "--dry-run")
    assert ended.returncode == 0, ended.stderr
    assert "poet is merged: 6 modules of the model" in " ".join(ended.stdout.split())
