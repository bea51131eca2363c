"""Whole conversions of tiny models of every family, on the reference runtime, against Hugging
Face's own generate."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ane_moe.conversion.pipeline import ConvertOptions, convert
from ane_moe.errors import UserError
from ane_moe.formats.recipe import FP16
from ane_moe.loop.generation import GenerateOptions, generate
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from tests.models import DECIDED, DECODERS, make_model, make_variant, save_checkpoint

NEW_TOKENS = 32
MARGIN = 1e-2  # where HF's best two logits are closer, fp16 may choose the other
MIN_DECIDED = 8  # ids to compare at the least, or the test says little
COSINE = (
    0.9999  # of the logits of one position; the median, since a near tie in routing flips a few
)
PROMPT = np.random.default_rng(0).integers(3, 211, 100).tolist()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def converted(model, folder: Path, **options) -> Path:
    save_checkpoint(model, folder / "checkpoint")
    convert(
        folder / "checkpoint", folder / "out", ConvertOptions(context=160, recipe=FP16, **options)
    )
    return folder / "out"


def greedy(session, count=NEW_TOKENS):
    generation = generate(session, PROMPT, GenerateOptions(max_tokens=count))
    return [piece.id for piece in generation]


def assert_greedy_ids_agree(model, ids):
    """Up to the first place where HF itself is nearly undecided."""
    with torch.no_grad():
        hf = model.generate(
            torch.tensor([PROMPT]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    expected = hf.sequences[0, len(PROMPT) :].tolist()
    margins = [
        float(best - second)
        for best, second in (torch.topk(step[0], 2).values for step in hf.logits)
    ]
    decided = next((i for i, margin in enumerate(margins) if margin <= MARGIN), len(expected))
    assert ids[:decided] == expected[:decided]
    assert decided >= MIN_DECIDED and (decided < len(expected) or len(ids) == len(expected))


def assert_logits_agree(model, session):
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits[0].numpy()
    logits = session.prefill_logits(PROMPT)
    norms = np.linalg.norm(logits, axis=1) * np.linalg.norm(expected, axis=1)
    assert np.median((logits * expected).sum(1) / norms) > COSINE


@pytest.mark.parametrize("family", DECODERS)
def test_a_family_generates_the_ids_of_hugging_face(family, tmp_path):
    model = make_model(family, seed=DECIDED.get(family, 0))
    shards = load_shards(converted(model, tmp_path), "reference")
    assert_logits_agree(model, Session(shards))
    assert_greedy_ids_agree(model, greedy(Session(shards)))


def test_windows_explicit_state_the_other_layout_and_no_prefill_generate_them_too(tmp_path):
    model = make_variant("qwen3_moe with windows")
    out = converted(model, tmp_path, state="explicit", layout="bct1", prefill=0)
    assert_greedy_ids_agree(model, greedy(Session(load_shards(out, "reference"))))


def test_damage_and_parts_are_refused_by_name(tmp_path):
    out = converted(make_model("mixtral"), tmp_path, layers=(0, 1))
    with pytest.raises(UserError, match="part of the model only"):
        load_shards(out, "reference")
    (out / "runtime_meta.json").unlink()
    with pytest.raises(UserError, match="not a finished conversion"):
        load_shards(out, "reference")
