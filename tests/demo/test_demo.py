"""The packaged demo checkpoint is what its card says, judged by Hugging Face's own classes."""

import ast
import json
import math
import sysconfig
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from ane_moe.cli import app
from ane_moe.demo import copy_demo, demo_checkpoint
from ane_moe.errors import UserError

MAX_CHECKPOINT_BYTES = 8_000_000
HELD_OUT_MODULES = (
    "plistlib.py",
    "locale.py",
    "wsgiref/util.py",
)  # in no training text, in every Python
WINDOW = 512  # tokens
UNIGRAM_MARGIN = (
    5  # the model's perplexity is at least this many times below the best unigram model's
)
TOKEN_ENTROPY_LIMIT = 0.95 * math.log(8)  # nats; uniform routing over 8 experts has ln 8


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo_checkpoint(), local_files_only=True)


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(
        demo_checkpoint(),
        local_files_only=True,
        dtype=torch.float32,
        experts_implementation="eager",
    ).eval()


@pytest.fixture(scope="module")
def windows(tokenizer):
    """Token ids [count, WINDOW] of library files that the model was not trained on."""
    library = Path(sysconfig.get_paths()["stdlib"])
    text = "".join((library / name).read_text(encoding="utf-8") for name in HELD_OUT_MODULES)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)[:16]


@pytest.fixture(scope="module")
def output(model, windows):
    with torch.inference_mode():
        return model(input_ids=windows, labels=windows, output_router_logits=True, use_cache=False)


def test_the_checkpoint_is_a_small_qwen3_moe_with_eight_experts_and_top_two():
    config = json.loads((demo_checkpoint() / "config.json").read_text())
    claimed = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 4,
        "num_experts_per_tok": 2,
        "hidden_size": 128,
        "head_dim": 32,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
        "dtype": "float16",
    }
    assert {name: config[name] for name in claimed} == claimed
    assert sum(path.stat().st_size for path in demo_checkpoint().iterdir()) < MAX_CHECKPOINT_BYTES


def test_every_saved_weight_is_finite_float16():
    for name, tensor in load_file(demo_checkpoint() / "model.safetensors").items():
        assert tensor.dtype == torch.float16, name
        assert tensor.isfinite().all(), name


def test_transformers_builds_the_model_from_the_folder_alone(model):
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    assert [layer.mlp.experts.num_experts for layer in model.model.layers] == [8, 8, 8, 8]


def test_held_out_perplexity_is_far_below_that_of_the_best_unigram_model(windows, output):
    logits, targets = output.logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()
    perplexity = torch.nn.functional.cross_entropy(logits, targets).exp().item()
    # No unigram model does better on a text than the text's own token frequencies.
    frequencies = torch.bincount(targets) / len(targets)
    unigram_perplexity = torch.special.entr(frequencies).sum().exp().item()
    assert perplexity * UNIGRAM_MARGIN < unigram_perplexity


def test_the_router_of_every_layer_decides_and_uses_every_expert(output):
    for logits in output.router_logits:  # [tokens, experts]
        probabilities = logits.softmax(-1)
        assert torch.special.entr(probabilities).sum(-1).mean() < TOKEN_ENTROPY_LIMIT
        assert len(probabilities.topk(2).indices.unique()) == 8


def test_greedy_generation_continues_a_method_with_lines_that_parse(model, tokenizer):
    inputs = tokenizer(
        "class Reader:\n    def __init__(self", return_tensors="pt", return_token_type_ids=False
    )
    output = model.generate(**inputs, do_sample=False, max_new_tokens=40)
    lines = tokenizer.decode(output[0]).splitlines()[:-1]  # the last may be cut short
    assert len(lines) > 3
    ast.parse("\n".join(lines))


def test_the_card_states_the_recorded_figures():
    record = json.loads((demo_checkpoint() / "training.json").read_text())
    card = (demo_checkpoint() / "README.md").read_text(encoding="utf-8")
    assert f"| {record['metrics']['perplexity']:.2f} |" in card
    assert f"| {record['metrics']['unigram_perplexity']:.2f} |" in card
    assert all(f"{layer['token_entropy']:.3f}" in card for layer in record["metrics"]["routing"])


@settings(deadline=None)
@given(st.text())
def test_the_tokenizer_gives_back_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("below", ["", "new", "new/deeper"])
def test_a_copy_holds_the_same_bytes_and_nothing_else(tmp_path, below):
    dest = tmp_path / below
    assert copy_demo(dest) == dest
    assert contents(dest) == contents(demo_checkpoint())


def test_a_copy_is_refused_where_files_lie_and_leaves_them_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="new or empty folder"):
        copy_demo(tmp_path)
    assert contents(tmp_path) == {"mine.txt": b"mine"}


def test_a_copy_is_refused_onto_a_file(tmp_path):
    dest = tmp_path / "file"
    dest.write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        copy_demo(dest)


def test_a_disk_that_fills_up_leaves_no_half_copy(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(UserError, match="No space left"):
        copy_demo(tmp_path)
    assert contents(tmp_path) == {}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_convert_says_comes_next_is_a_command_that_works(tmp_path: Path) -> None:
    asked = ["convert", "demo", str(tmp_path / "out"), "--layers", "0", "--prefill", "0"]
    converted = CliRunner().invoke(app, [*asked, "--context", "64", "--workers", "1"])
    (line,) = [one for one in converted.stdout.splitlines() if one.startswith("next: ane-moe ")]
    told = line.removeprefix("next: ane-moe ").split()
    assert told == ["verify", str(tmp_path / "out"), "--checkpoint", "demo"]
    prompts = tmp_path / "prompts.json"
    prompts.write_text("[[3, 4, 5]]")
    options = ["--prompts", str(prompts), "--runtime", "reference", "--quick"]
    verified = CliRunner().invoke(app, [*told, *options])
    assert verified.exit_code == 0, verified.exception
