"""The script that writes random checkpoints with a real geometry."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from ane_moe.checkpoints.checkpoint import open_checkpoint
from ane_moe.families import describe, load_family
from ane_moe.families.config import Config
from ane_moe.model.weight import EMBEDDING, parse_name
from tests.models import CLASSES

SCRIPT = Path(__file__).parents[1] / "scripts" / "make_checkpoint.py"
TOTAL_PARAMETERS = {  # billions, of the whole models, as their authors give them
    "qwen3-30b-a3b": 30.5,
    "qwen1.5-moe-a2.7b": 14.3,
    "olmoe-1b-7b": 6.9,
    "mixtral-8x7b": 46.7,
    "granite-3.1-1b-a400m": 1.3,
    "granite-4.0-h-tiny": 6.94,
    "nemotron-3-nano-30b-a3b": 31.6,
    "nemotron-3-super-120b-a12b": 120,
    "jamba-v0.1": 51.6,
    "zaya1-8b": 8.84,
    "lfm2-8b-a1b": 8.34,
    "deepseek-v2-lite": 15.7,
    "gpt-oss-20b": 20.9,
    "qwen3.5-35b-a3b": 34.7,
    "privacy-filter": 1.4,
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    found = importlib.util.spec_from_file_location("make_checkpoint", SCRIPT)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["make_checkpoint"] = module  # dataclasses look their own module up
    found.loader.exec_module(module)
    return module


def exit_code(script: ModuleType, *arguments: str) -> int:
    app = typer.Typer()
    app.command()(script.main)
    return CliRunner().invoke(app, arguments).exit_code


@pytest.fixture(scope="module")
def granite(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "granite"
    arguments = (
        "--like",
        "granite-3.1-1b-a400m",
        "--layers",
        "1",
        "--out",
        str(out),
        "--shard-mb",
        "60",
    )
    assert exit_code(script, *arguments) == 0
    return out


def test_transformers_runs_the_checkpoint_and_its_activations_stay_finite(granite: Path) -> None:
    assert len(list(granite.glob("*.safetensors"))) > 1
    model, loading = AutoModelForCausalLM.from_pretrained(
        granite, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values())
    with torch.no_grad():
        out = model(torch.arange(20)[None], output_hidden_states=True, output_router_logits=True)
    assert out.logits.isfinite().all()
    assert max(float(hidden.abs().max()) for hidden in out.hidden_states) < 1000
    assert (
        float(torch.softmax(out.router_logits[0], -1).max(-1).values.mean())
        > 2 / model.config.num_local_experts
    )


def test_its_tensors_and_rows_all_differ(granite: Path) -> None:
    checkpoint = open_checkpoint(granite)
    _, sources = describe(checkpoint)
    experts = [
        checkpoint.read(sources[parse_name(f"layers.0.ffn.experts.{n}.up.weight")])
        for n in range(32)
    ]
    assert len({expert.tobytes() for expert in experts}) == 32
    assert len(np.unique(checkpoint.read(sources[EMBEDDING]), axis=0)) == 49155


@pytest.mark.parametrize("like", TOTAL_PARAMETERS)
def test_presets_have_the_size_of_the_real_models(script: ModuleType, like: str) -> None:
    preset = script.PRESETS[like]
    spec = load_family(preset["model_type"]).spec(Config(preset))
    total = sum(tensor.elements for tensor in script.planned_tensors(spec))
    assert total / 1e9 == pytest.approx(TOTAL_PARAMETERS[like], rel=0.03)
    with torch.device("meta"):
        kind = CLASSES.get(preset["model_type"], AutoModelForCausalLM)
        model = kind.from_config(AutoConfig.for_model(**preset))
    stored = {name for name, _ in model.named_buffers()} & set(model.state_dict())
    parts = [*model.parameters(), *(model.get_buffer(name) for name in stored)]
    assert sum(part.numel() for part in parts) == total


def test_wrong_options_are_usage_errors_that_leave_nothing(
    script: ModuleType, tmp_path: Path
) -> None:
    out = str(tmp_path / "x")
    for arguments in (
        ("--like", "gpt-2", "--out", out),
        ("--like", "olmoe-1b-7b", "--out", str(tmp_path)),
        ("--like", "olmoe-1b-7b", "--out", out, "--dtype", "int4"),
        ("--like", "olmoe-1b-7b", "--out", out, "--spectrum", "white"),
        ("--like", "olmoe-1b-7b", "--out", out, "--layers", "0"),
    ):
        assert exit_code(script, *arguments) == 2
    assert os.listdir(tmp_path) == []


def small_config(script: ModuleType) -> dict:
    small = {"num_hidden_layers": 1, "hidden_size": 128, "vocab_size": 100}
    return script.PRESETS["olmoe-1b-7b"] | small


@pytest.mark.parametrize("noise", ["Noise", "TrainedNoise"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_same_seed_gives_the_same_bytes(
    script: ModuleType, dtype: str, noise: str, tmp_path: Path
) -> None:
    files = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        made = getattr(script, noise)(dtype, seed)
        script.write_checkpoint(tmp_path / name, small_config(script), made, dtype, 10**9)
        describe(open_checkpoint(tmp_path / name))
        files.append(next((tmp_path / name).glob("*.safetensors")).read_bytes())
    assert files[0] == files[1] != files[2]


def test_a_trained_spectrum_has_leading_directions_and_an_uneven_router(
    script: ModuleType, tmp_path: Path
) -> None:
    config = small_config(script) | {"hidden_size": 512}
    shares, uses = {}, {}
    for name in ("Noise", "TrainedNoise"):
        (tmp_path / name).mkdir()
        made = getattr(script, name)("float32", 0)
        script.write_checkpoint(tmp_path / name, config, made, "float32", 10**9)
        weights = load_file(next((tmp_path / name).glob("*.safetensors")))
        layer = "model.layers.0."
        matrix, router = (
            weights[layer + part] for part in ("self_attn.q_proj.weight", "mlp.gate.weight")
        )
        assert matrix.std().item() == pytest.approx(512**-0.5, rel=0.05)
        energies = torch.linalg.svdvals(matrix).square()
        shares[name] = (energies[:32].sum() / energies.sum()).item()
        chosen = (torch.randn(4096, 512) @ router.T).topk(8).indices
        uses[name] = chosen.flatten().bincount(minlength=64).max().item() / 4096
    assert shares["Noise"] < 0.25
    assert 0.5 < shares["TrainedNoise"] < 0.65
    assert uses["Noise"] < 0.2 < uses["TrainedNoise"]
