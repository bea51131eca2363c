"""`--format aimodel` over the families: Hugging Face's model, the reference runtime and Core AI's on
the same prompts."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from ane_moe.conversion.pipeline import convert
from ane_moe.conversion.plan import ConvertOptions
from ane_moe.formats.recipe import FP16, find_recipe
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from ane_moe.original.golden import read_golden
from ane_moe.verification.verify import verify
from tests.models import DECODERS, make_model, save_checkpoint
from tests.zoo import ROWS

HAS_CORE_AI = importlib.util.find_spec("coreai_torch") is not None
pytestmark = pytest.mark.skipif(not HAS_CORE_AI, reason="Core AI's packages are not installed")

TOKENS, MORE = 20, 8
COSINE = 0.9999  # of logits, fp16
TIE = 0.01  # of the spread of scores: random models are not decided on all tokens
# Tokens for which fp16 chooses another expert: scores of random models tie more often.
ROUTED_OTHERWISE = 1
# Its windows see all of a prompt, which is longer for the golden: further tokens are of it there.
NO_DECODER_GOLDEN = "unlimited_ocr"
QUICK = "lfm2_moe"  # short convolutions beside attention, sigmoid routing
PROMPT = np.random.default_rng(0).integers(3, 211, TOKENS).tolist()


def scores(out: Path, ids: list[int]) -> np.ndarray:
    """Logits after the prompt and after each further one of `ids`, [1 + MORE,V]."""
    session = Session(load_shards(out))
    found = [session.prefill(ids[:TOKENS]).copy()]  # a session has one array for its scores
    found += [session.decode(token).copy() for token in ids[TOKENS : TOKENS + MORE]]
    return np.array(found, np.float64)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.sum(a * b, -1) / norms


def agree(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Whether both choose the same tokens, but where ours are as good as equal, and one more."""
    chosen = theirs.argmax(-1)[:, None]
    lost = ours.max(-1) - np.take_along_axis(ours, chosen, -1)[:, 0]
    return int((lost > TIE * ours.std(-1)).sum()) <= ROUTED_OTHERWISE


def compared(family: str, folder: Path, prefill: int = 16) -> dict[str, float]:
    """The least cosines of the three pairs, but for one token, over the prompt's last and those
    after it, which are the golden's own."""
    seed = ROWS[family].seed if family in ROWS else 0
    checkpoint = save_checkpoint(make_model(family, seed=seed), folder / "checkpoint")
    ids = [*PROMPT, *np.random.default_rng(1).integers(3, 211, MORE).tolist()]
    (folder / "prompts.json").write_text(json.dumps([ids]))
    for form in ("mlpackage", "aimodel"):
        options = ConvertOptions(recipe=FP16, format=form, prefill=prefill, context=64)
        golden = form == "mlpackage"
        prompts = folder / "prompts.json" if golden else None
        convert(checkpoint, folder / form, options, golden=golden, prompts=prompts)
    original = np.asarray(read_golden(folder / "mlpackage/golden.safetensors").logits, np.float64)
    ours, theirs = (scores(folder / form, ids) for form in ("mlpackage", "aimodel"))
    assert agree(ours, theirs)
    hf = original[TOKENS - 1 : TOKENS + MORE]
    pairs = {"HF, reference": (hf, ours), "HF, Core AI": (hf, theirs), "both": (ours, theirs)}
    return {name: float(np.sort(cosines(*pair))[ROUTED_OTHERWISE]) for name, pair in pairs.items()}


def test_three_opinions_agree(tmp_path: Path) -> None:
    assert min(compared(QUICK, tmp_path, prefill=0).values()) > COSINE


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted({*DECODERS, *ROWS} - {NO_DECODER_GOLDEN}))
def test_three_opinions_agree_in_every_family(family: str, tmp_path: Path) -> None:
    assert min(compared(family, tmp_path).values()) > COSINE


@pytest.mark.slow
@pytest.mark.parametrize("compress", ["fp16", "int8"])
def test_an_encoder_is_proved_right_by_core_ai(compress: str, tmp_path: Path) -> None:
    """Functions for lengths, labels, and biases of bands."""
    checkpoint = save_checkpoint(make_model("openai_privacy_filter"), tmp_path / "checkpoint")
    (tmp_path / "prompts.json").write_text(json.dumps([PROMPT]))
    options = ConvertOptions(recipe=find_recipe(compress), format="aimodel", lengths=(16, 32))
    out, prompts = tmp_path / "out", tmp_path / "prompts.json"
    convert(checkpoint, out, options, golden=True, prompts=prompts)
    report = verify(out)
    assert report.passed and report.runtime == "coreai" and not report.model_skipped
