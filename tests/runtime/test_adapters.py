"""Conversions of models with adapters, against peft's own models."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from ane_moe.verification.verify import verify
from tests.adapters import adapt
from tests.models import make_model, save_checkpoint
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


def least_cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


def converted(out: Path) -> np.ndarray:
    return Session(load_shards(out, "reference")).prefill_logits(IDS)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_conversion_has_the_logits_of_peft(family: str, tmp_path: Path) -> None:
    base = save_checkpoint(make_model(family), tmp_path / "base")
    expected = logits_of(adapt(make_model(family), tmp_path / "poet", **FAMILIES[family]))
    poet = (str(tmp_path / "poet"),)
    out = tiny_conversion(base, tmp_path / "out", golden=True, adapters=poet, **OPTIONS)
    assert (
        least_cosine(converted(out), expected)
        > COSINE
        > least_cosine(logits_of(make_model(family)), expected)
    )
    assert verify(out).passed


def test_a_golden_of_now_has_the_adapter_too(tmp_path: Path) -> None:
    base = save_checkpoint(make_model("mixtral"), tmp_path / "base")
    adapt(make_model("mixtral"), tmp_path / "poet", **FAMILIES["mixtral"])
    poet = tmp_path / "poet"
    out = tiny_conversion(base, tmp_path / "out", adapters=(str(poet),), **OPTIONS)
    assert verify(out, checkpoint=base, adapters=[poet]).passed
    assert not verify(out, checkpoint=base).passed
