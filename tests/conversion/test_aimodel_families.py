"""`--format aimodel` over the families: Hugging Face's model, the conversion for Core ML and the one
for Core AI on the same tokens, as `scripts/core_ai_families.py` compares them for docs/coreai.md."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

from ane_moe.conversion.job import plan_of
from ane_moe.conversion.pipeline import convert
from ane_moe.conversion.plan import ConvertOptions
from ane_moe.emit.coreai.tracing import with_open_weights
from ane_moe.emit.coreml.tracing import make_template
from ane_moe.errors import UserError
from ane_moe.formats.recipe import FP16, find_recipe
from ane_moe.model.template_key import TemplateKey
from ane_moe.opened import open_model
from ane_moe.runtime.coreai.twin import Twin
from ane_moe.verification.against import check_against
from ane_moe.verification.verify import verify
from scripts.core_ai_families import (
    CASES,
    COSINE,
    ENCODER,
    INDEXED,
    INDEXERS,
    TABLE,
    Compared,
    compared,
)
from tests.models import make_model, save_checkpoint
from tests.slow_set import slow_but

HAS_CORE_AI = importlib.util.find_spec("coreai_torch") is not None
needs_core_ai = pytest.mark.skipif(not HAS_CORE_AI, reason="Core AI's packages are not installed")

PROMPTS = [np.random.default_rng(seed).integers(3, 211, 30).tolist() for seed in (0, 1)]
QUICK = "olmoe"
EXPERTS = {"expert_tokens": (1, 16)}
FORMS = {
    "masked": {},
    "soft": {"routing": "soft"},
    "sparse": {"routing": "sparse", **EXPERTS},
    "stream": {"routing": "stream", **EXPERTS},
    "explicit states, turned": {"state": "explicit", "layout": "bct1"},
    "rings": {"ring_caches": True},
    "a roster": {"roster": True, "routing": "sparse", **EXPERTS},
    "divided, two layers a shard": {"layers_per_shard": 2, "stream_divisor": 2},
    "packed tracks": {"inputs": "embeds", "tracks": "packed"},
}


def agree(row: Compared) -> bool:
    same = row.as_hf == row.as_ml == row.tokens
    return same and min(row.hf_ml, row.hf_ai, row.ml_ai) > COSINE


@needs_core_ai
def test_three_opinions_agree(tmp_path: Path) -> None:
    (row,) = compared(QUICK, tmp_path, ("masked",), prefill=0)
    assert agree(row)


@needs_core_ai
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_three_opinions_agree_in_every_family(case: str, tmp_path: Path) -> None:
    assert [row for row in compared(case, tmp_path, ("sparse",)) if not agree(row)] == []


def test_the_page_has_a_line_of_each_family() -> None:
    found = re.findall(r"^\| ([a-z]\w+(?: with indexers)?) \| \d", TABLE.text, re.M)
    assert tuple(found) == CASES


@needs_core_ai
@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(INDEXED))
def test_indexers_are_judged_by_core_ai(case: str, tmp_path: Path) -> None:
    """Two prompts of 30 tokens, of which 12 are chosen."""
    checkpoint = save_checkpoint(make_model(case, **INDEXED[case]), tmp_path / "checkpoint")
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    options = ConvertOptions(recipe=FP16, prefill=16, context=64)
    out = tmp_path / "out"
    convert(checkpoint, out, options, golden=True, prompts=tmp_path / "prompts.json")
    report = check_against(out, "coreai")
    assert report.passed and not report.left_out


def templates_of(case: str, folder: Path, **options) -> list[TemplateKey]:
    """The distinct graphs of a conversion; none where there is no such conversion."""
    family = case.removesuffix(INDEXERS)
    changes = INDEXED[family] if case != family else {}
    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        save_checkpoint(make_model(family, **changes), checkpoint)
    shape = {"lengths": (16,)} if family == ENCODER else {"prefill": 16, "context": 64}
    try:
        plan = plan_of(open_model(checkpoint), ConvertOptions(recipe=FP16, **shape, **options))
    except UserError:  # a form that the family has not
        return []
    return [key for shard in plan.shards for key in shard.graphs.values()]


@needs_core_ai
@pytest.mark.parametrize("case", slow_but([], CASES))
def test_the_twin_has_every_operation_of_a_family_in_any_form(case: str, tmp_path: Path) -> None:
    """What the twin lacks is refused by name: nothing is."""
    forms = FORMS.values()
    found = {key for options in forms for key in templates_of(case, tmp_path, **options)}
    assert found
    for key in found:
        program = with_open_weights(make_template(key))
        for function in program.functions:
            Twin(program, function)


@needs_core_ai
@pytest.mark.slow
@pytest.mark.parametrize("compress", ["fp16", "int8"])
def test_an_encoder_is_proved_right_by_core_ai(compress: str, tmp_path: Path) -> None:
    """Functions for lengths, labels, and biases of bands."""
    checkpoint = save_checkpoint(make_model(ENCODER), tmp_path / "checkpoint")
    (tmp_path / "prompts.json").write_text(json.dumps([PROMPTS[0][:20]]))
    options = ConvertOptions(recipe=find_recipe(compress), format="aimodel", lengths=(16, 32))
    out, prompts = tmp_path / "out", tmp_path / "prompts.json"
    convert(checkpoint, out, options, golden=True, prompts=prompts)
    report = verify(out)
    assert report.passed and report.runtime == "coreai" and not report.model_skipped
