"""Conversions of models with adapters, against peft's own models."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ane_moe.benchmark.measurement import BenchOptions, bench
from ane_moe.checkpoints.adapter import open_adapter
from ane_moe.conversion.plan import BLOB_OVERHEAD
from ane_moe.errors import UserError
from ane_moe.formats.recipe import find_recipe
from ane_moe.loop.opened import open_model
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from ane_moe.manifest import read_manifest
from ane_moe.verification.verify import verify
from tests.adapters import adapt
from tests.models import make_model, save_checkpoint
from tests.slow_set import slow_but
from tests.test_cli import ane_moe
from tests.verification.tiny import tiny_conversion

IDS = np.random.default_rng(5).integers(3, 211, 13).tolist()  # prefill calls of 8 and of 5 tokens
COSINE = 0.9995
OPTIONS = {"prefill": 8, "context": 64}
# What adapters of each family's model adapt.
FAMILIES = {
    "olmoe": {},
    "qwen3_moe": {"use_rslora": True},
    "mixtral": {"target_modules": ["q_proj", "o_proj", "w1", "w2", "w3"]},
    "afm": {},
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@torch.no_grad()
def logits_of(model) -> np.ndarray:
    return model(torch.tensor([IDS])).logits[0].numpy()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of the logits of most tokens: in fp16 one may be routed otherwise, at a near tie."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    each = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return float(np.quantile(each, 0.2))


def converted(out: Path, adapter: str | None = None) -> np.ndarray:
    return Session(load_shards(out, "reference", adapter=adapter)).prefill_logits(IDS)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_conversion_has_the_logits_of_peft(family: str, tmp_path: Path) -> None:
    base = save_checkpoint(make_model(family), tmp_path / "base")
    expected = logits_of(adapt(make_model(family), tmp_path / "poet", **FAMILIES[family]))
    poet = (str(tmp_path / "poet"),)
    out = tiny_conversion(base, tmp_path / "out", golden=True, adapters=poet, **OPTIONS)
    assert (
        cosine(converted(out), expected) > COSINE > cosine(logits_of(make_model(family)), expected)
    )
    assert verify(out).passed


def test_a_golden_of_now_has_the_adapter_too(tmp_path: Path) -> None:
    base = save_checkpoint(make_model("mixtral"), tmp_path / "base")
    adapt(make_model("mixtral"), tmp_path / "poet", **FAMILIES["mixtral"])
    poet = tmp_path / "poet"
    out = tiny_conversion(base, tmp_path / "out", adapters=(str(poet),), **OPTIONS)
    assert verify(out, checkpoint=base, adapters=[poet]).passed
    assert not verify(out, checkpoint=base).passed


# -- switched on -----------------------------------------------------------------------------


def two_adapters(family: str, folder: Path) -> dict[str, np.ndarray]:
    """Two adapters of a model, and the logits that it has with each, and without."""
    settings = FAMILIES[family]
    few = {"target_modules": ["q_proj", "v_proj"], "r": 3, "lora_alpha": 9}
    return {
        "poet": logits_of(adapt(make_model(family), folder / "poet", **settings)),
        "clerk": logits_of(adapt(make_model(family), folder / "clerk", 1, **few)),
        "": logits_of(make_model(family)),
    }


SWITCHED = {
    "olmoe": ("olmoe", {}),
    "qwen3_moe": ("qwen3_moe", {"routing": "sparse", "experts_per_function": 2}),
    "mixtral": ("mixtral", {"layers_per_shard": 2, "state": "explicit"}),
    "afm": ("afm", {}),
    "compressed": ("qwen3_moe", {"recipe": find_recipe("int8", rank=2)}),
}


@pytest.mark.parametrize("case", slow_but(["olmoe"], SWITCHED))
def test_adapters_are_switched_on_at_load(case: str, tmp_path: Path) -> None:
    """Each has peft's logits and passes its own proof, on weights that are stored once."""
    family, options = SWITCHED[case]
    save_checkpoint(make_model(family), tmp_path / "base")
    expected = two_adapters(family, tmp_path)
    folders = tuple(str(tmp_path / name) for name in ("poet", "clerk"))
    asked = {**OPTIONS, **options, "adapters": folders, "adapter_mode": "switch"}
    out = tiny_conversion(tmp_path / "base", tmp_path / "out", golden=True, **asked)
    least = 0.999 if case == "compressed" else COSINE
    found = {name: converted(out, name or None) for name in expected}
    for name, logits in expected.items():
        assert cosine(found[name], logits) > least, name
        others = [other for other in expected if other != name]
        assert all(cosine(found[name], expected[other]) < 0.99 for other in others)
        assert verify(out, adapters=[name] if name else []).passed
    plain = tiny_conversion(tmp_path / "base", tmp_path / "plain", **OPTIONS, **options)
    assert np.array_equal(converted(plain), found[""])


def test_beside_a_store_projections_are_switched_on_and_experts_are_not(tmp_path: Path) -> None:
    save_checkpoint(make_model("qwen3_moe"), tmp_path / "base")
    expected = two_adapters("qwen3_moe", tmp_path)

    def streamed(name: str, **mode: str) -> Path:
        asked = {**OPTIONS, "routing": "stream", "adapters": (str(tmp_path / name),), **mode}
        return tiny_conversion(tmp_path / "base", tmp_path / f"out-{name}", **asked)

    out = streamed("clerk", adapter_mode="switch")
    assert cosine(converted(out, "clerk"), expected["clerk"]) > COSINE
    assert cosine(converted(out), expected[""]) > COSINE
    with pytest.raises(UserError, match=r"poet cannot be switched: it adapts experts, .* a store"):
        streamed("poet", adapter_mode="switch")
    assert cosine(converted(streamed("poet")), expected["poet"]) > COSINE


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("weight.bin"))


def test_the_base_is_stored_once(tmp_path: Path) -> None:
    """An adapter takes the bytes of its own numbers, and what stored arrays take for themselves."""
    base = save_checkpoint(make_model("afm"), tmp_path / "base")
    adapt(make_model("afm"), tmp_path / "poet")
    poet = open_adapter(tmp_path / "poet")
    plain = tiny_conversion(base, tmp_path / "plain", **OPTIONS)
    asked = {"adapters": (str(tmp_path / "poet"),), "adapter_mode": "switch"}
    both = tiny_conversion(base, tmp_path / "both", **OPTIONS, **asked)
    arrays = 2 * sum(len(pairs) for pairs in poet.pairs.values())
    more = weight_bytes(both) - weight_bytes(plain)
    assert 2 * poet.count <= more <= 2 * poet.count + BLOB_OVERHEAD * arrays
    for shard in read_manifest(both).shards:
        assert shard.weight_bytes <= weight_bytes(both / shard.path)


def test_what_cannot_be_switched_is_refused(tmp_path: Path) -> None:
    base = save_checkpoint(make_model("olmoe"), tmp_path / "base")
    adapt(make_model("olmoe"), tmp_path / "all", target_modules="all-linear")
    adapt(make_model("olmoe"), tmp_path / "saved", modules_to_save=["lm_head"])
    for name, message in (("all", "more than projections.*router"), ("saved", "whole tensors")):
        asked = {"adapters": (str(tmp_path / name),), "adapter_mode": "switch"}
        with pytest.raises(UserError, match=f"{message}.*--adapter-mode merge"):
            tiny_conversion(base, tmp_path / "out", **OPTIONS, **asked)
    asked = {"adapters": (str(tmp_path / "all"),) * 2, "adapter_mode": "switch"}
    with pytest.raises(UserError, match="two adapters are called all"):
        tiny_conversion(base, tmp_path / "out", **OPTIONS, **asked)


def test_a_damaged_adapter_fails_its_own_proof_alone(tmp_path: Path) -> None:
    """Its functions on another adapter's numbers; without it nothing has changed."""
    base = save_checkpoint(make_model("mixtral"), tmp_path / "base")
    adapt(make_model("mixtral"), tmp_path / "poet", **FAMILIES["mixtral"])
    adapt(make_model("mixtral"), tmp_path / "other/poet", 1, **FAMILIES["mixtral"])
    made = {}
    for place in ("poet", "other/poet"):
        asked = {"adapters": (str(tmp_path / place),), "adapter_mode": "switch"}
        made[place] = tiny_conversion(base, tmp_path / f"of {place}", **OPTIONS, **asked)
    assert verify(made["poet"], checkpoint=base, adapters=[tmp_path / "poet"]).passed
    assert verify(made["poet"], checkpoint=base).passed
    other = made["other/poet"]
    assert not verify(other, checkpoint=base, adapters=[tmp_path / "poet"]).passed
    assert verify(other, checkpoint=base).passed


def test_an_adapter_that_is_not_there_is_named(tmp_path: Path) -> None:
    base = save_checkpoint(make_model("mixtral"), tmp_path / "base")
    adapt(make_model("mixtral"), tmp_path / "poet", **FAMILIES["mixtral"])
    asked = {"adapters": (str(tmp_path / "poet"),), "adapter_mode": "switch"}
    out = tiny_conversion(base, tmp_path / "out", golden=True, **OPTIONS, **asked)
    with pytest.raises(UserError, match="no adapter clerk in the conversion; found: poet"):
        load_shards(out, "reference", adapter="clerk")
    generated = ane_moe(
        "generate", out, "--adapter", "poet", "--prompt-ids", "5,6", "--max-tokens", "2"
    )
    assert generated.returncode == 0, generated.stderr
    asking = ("generate", "--prompt-ids", "5,6"), ("chat",), ("serve", "--port", "0"), ("bench",)
    for command in asking:
        refused = ane_moe(command[0], out, *command[1:], "--adapter", "clerk")
        assert refused.returncode == 2
        assert "no adapter clerk in the conversion; found: poet" in refused.stderr
    measured = bench(out, BenchOptions(1, 0, 2, fills=(0,), lengths=(8,), adapter="poet"))
    assert measured.passed and measured.conditions.adapter == "poet"
    assert all(check.model.logit_cosine > COSINE for check in measured.checks)
    switched = open_model(out, "reference", adapter="poet").shards
    assert np.array_equal(Session(switched).prefill_logits(IDS), converted(out, "poet"))
    assert not np.array_equal(converted(out, "poet"), converted(out))
