"""The packaged models of research systems: each is what its card says, loads in its reference model,
and becomes shards that pass verification."""

import json
import math
import plistlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from ane_moe import convert
from ane_moe.cli import app
from ane_moe.conversion.plan import ConvertOptions
from ane_moe.demo import DEMOS, built_in, find_demo
from ane_moe.formats.recipe import FP16, find_recipe
from ane_moe.original import afm as afm  # register themselves with transformers
from ane_moe.original import omni_moe as omni_moe
from ane_moe.original import pt_moe as pt_moe
from ane_moe.verification.verify import verify
from tests.slow_set import slow_but

RESEARCH = {
    "two-bit": ("qwen3_moe", find_recipe("apple2")),
    "pt-moe": ("pt_moe", FP16),
    "omni-moe": ("omni_moe", FP16),
    "afm": ("afm", FP16),
}
MAX_BYTES = {"two-bit": 5_500_000, "pt-moe": 2_000_000, "omni-moe": 3_000_000, "afm": 2_000_000}
# Perplexity is at least so many times below token frequencies', of all that is held out and of one
# passage, whose beginning has nothing before it.
MARGIN, MARGIN_OF_PASSAGE = 3, 2
PROMPT = "class Reader:\n    def __init__(self, name):\n        self.name = "


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", RESEARCH)
def test_the_folder_is_small_and_its_weights_are_finite_halves(name):
    folder = find_demo(name)
    assert json.loads((folder / "config.json").read_text())["model_type"] == RESEARCH[name][0]
    assert sum(path.stat().st_size for path in folder.iterdir()) < MAX_BYTES[name]
    for tensor, value in load_file(folder / "model.safetensors").items():
        assert value.isfinite().all(), tensor
        assert value.dtype == torch.float16 or "quant_" in tensor, tensor


@pytest.mark.parametrize("name", RESEARCH)
def test_the_reference_model_is_as_good_as_the_card_says(name):
    """On a file that every Python has and no training text, far better than token frequencies."""
    folder = find_demo(name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = Path(plistlib.__file__).read_text()
    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"][:256]
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    perplexity = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])).exp().item()
    kept = json.loads((folder / "training.json").read_text())["quality"]
    assert kept["perplexity"] * MARGIN < kept["unigram_perplexity"]
    assert perplexity < kept["unigram_perplexity"] / MARGIN_OF_PASSAGE
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"| this model | {kept['perplexity']:.2f} | {kept['bits_per_byte']:.3f} |" in card
    assert f"demo model `{name}`" in card


@pytest.mark.parametrize("name", slow_but(["two-bit"], RESEARCH))
def test_it_converts_and_verifies(name, tmp_path):
    out = tmp_path / "out"
    options = ConvertOptions(context=64, prefill=16, recipe=RESEARCH[name][1])
    convert(built_in(Path(f"demo-{name}")), out, options, golden=True)
    prompts = tmp_path / "prompts.json"
    ids = AutoTokenizer.from_pretrained(find_demo(name))(PROMPT)["input_ids"]
    prompts.write_text(json.dumps([ids]))
    report = verify(out, checkpoint=find_demo(name), prompts=prompts, runtime="reference")
    assert report.passed, report


def test_training_closes_four_fifths_of_what_two_bits_lose_without_it():
    rows = json.loads((find_demo("two-bit") / "training.json").read_text())["conversions"]
    plain, rounded, trained = (row["nats"] for row in rows)
    assert [row["name"] for row in rows] == ["fp16", "apple2", "apple2, trained"]
    assert (rounded - trained) / (rounded - plain) >= 0.8
    assert math.isclose(math.log(rows[2]["perplexity"]), trained)


def run(*arguments):
    return CliRunner().invoke(app, ["demo", *map(str, arguments)])


@pytest.mark.parametrize("name", DEMOS)
def test_the_command_writes_the_demo_of_that_name(name, tmp_path):
    done = run(name, tmp_path / "new")
    assert done.exit_code == 0 and done.stdout.strip() == str(tmp_path / "new")
    written = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    assert written == {path.name: path.read_bytes() for path in find_demo(name).iterdir()}


def test_without_a_name_it_is_the_language_model(tmp_path):
    assert run(tmp_path / "new").exit_code == 0
    config = (find_demo("language") / "config.json").read_bytes()
    assert (tmp_path / "new" / "config.json").read_bytes() == config


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("nosuch", "new"), "there is no such demo; found: 'nosuch'; name one of these: language"),
        (("two-bit",), "needs a folder to be written to; found: only the name two-bit"),
    ],
)
def test_what_cannot_be_written_is_one_clear_line(arguments, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert line in str(done.exception) and not list(tmp_path.iterdir())
