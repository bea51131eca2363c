"""Conversions of a checkpoint whose numbers overflow, as it is and mended: what the tests of both
kinds of overflow share. A test file gives the checkpoint as its fixture `large`."""

import json
from dataclasses import replace

import pytest

from ane_moe.conversion.pipeline import convert
from ane_moe.conversion.plan import ConvertOptions
from ane_moe.formats.recipe import FP16

PROMPTS = [[5, 9, 11, 3, 20, 33], [7, 8, 9, 1]]
OPTIONS = ConvertOptions(prefill=0, context=32, recipe=FP16)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.json"
    path.write_text(json.dumps(PROMPTS))
    return path


@pytest.fixture(scope="module")
def reports(large, prompts, tmp_path_factory):
    """As it is, and by default."""
    folder, made = tmp_path_factory.mktemp("out"), {}
    for name, divisor in {"before": 1, "after": None}.items():
        options = replace(OPTIONS, stream_divisor=divisor)
        made[name] = convert(large, folder / name, options, golden=True, prompts=prompts)
    return made
