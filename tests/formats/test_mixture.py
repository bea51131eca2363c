"""Formats mixed to a given rate: counted in the packages' weight files, and by hand."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ane_moe.demo import demo_checkpoint
from ane_moe.errors import UserError
from ane_moe.formats.expand import expand
from ane_moe.formats.low_rank import split_directions
from ane_moe.formats.mixture import with_mixed_formats
from ane_moe.formats.recipe import Choice, Mixture, Recipe, find_format, find_recipe
from ane_moe.manifest import read_manifest
from ane_moe.mlprogram.reader import read_program
from ane_moe.mlprogram.weights import weights_of
from ane_moe.model.weight import EMBEDDING, WeightName
from ane_moe.opened import open_model
from tests.verification.tiny import tiny_checkpoint, tiny_conversion

RATE = 3.56
WITHIN = 0.01  # bits: less than one matrix of the built-in model makes


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("server") / "out"
    return tiny_conversion(demo_checkpoint(), out, recipe=find_recipe("server"), context=64)


def test_the_weight_files_hold_as_many_bits_as_are_asked_for(converted):
    """Indices, palettes and directions, of each matrix that is compressed."""
    stored, elements, formats = 0, 0, Counter()
    for shard in read_manifest(converted).shards:
        function = read_program(converted / shard.path).functions[shard.functions[0].name]
        named = [weight for weight in weights_of(function) if weight.format.startswith("lut")]
        apart = [weight for weight in weights_of(function) if "__recover_" in weight.name]
        pieces = {key: size for weight in named + apart for key, size in weight.parts}
        stored += sum(pieces.values())
        elements += sum(weight.elements for weight in named)
        formats.update(weight.format.split()[0] for weight in named)
    assert 8 * stored / elements == pytest.approx(RATE, abs=WITHIN)
    assert set(formats) == {"lut3", "lut4"}
    said = read_manifest(converted).compression.values()
    assert 8 * stored == 8 * sum(facts["bytes"] for facts in said)


def fake(shape, role):
    return SimpleNamespace(shape=shape, role=role)


def test_experts_give_way_first_evenly_and_the_head_last():
    """By hand: 64 x 64 at 8 and 4 bits, 4096 and 2048 bytes, and a scale of 2 bytes a row."""
    experts = {
        WeightName(layer, "ffn", 0, "gate.weight"): fake((64, 64), "experts.gate")
        for layer in range(8)
    }
    head = {WeightName(None, "head", None, "rows.weight"): fake((64, 64), "head")}
    plain = {
        WeightName(0, "ffn", None, "router.weight"): fake((8, 64), None),
        WeightName(0, "attn", None, "q.weight"): fake((64, 64), "attention.q"),
        EMBEDDING: fake((64, 64), "embedding"),
    }
    roles = {"default": "int8", "embedding": "int8", "attention": "as-stored"}
    choices = {role: Choice(form) for role, form in roles.items()}
    recipe = Recipe("r", choices, mixture=Mixture(6.25, "int4-channel"))
    mixed = with_mixed_formats(recipe, {**head, **experts, **plain}).overrides
    # 9 matrices at 8.25 bits; each that gives way takes 4 / 9 bits off: 5 of them, 6.03 bits.
    assert set(mixed.values()) == {"int4-channel"} and len(mixed) == 5
    layers = sorted(int(name.split(".")[1]) for name in mixed)
    assert all(len({layer // 2} & {n // 2 for n in layers}) for layer in range(8))
    every = with_mixed_formats(
        replace(recipe, mixture=Mixture(4.25, "int4-channel")), {**head, **experts, **plain}
    )
    assert len(every.overrides) == 9


def test_a_rate_that_no_mixture_has_is_one_clear_error(tmp_path):
    sources = open_model(tiny_checkpoint("qwen3_moe", tmp_path)).sources
    with pytest.raises(UserError, match="recipe server cannot store this model at"):
        with_mixed_formats(find_recipe("server", rank=8), sources)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits = 3.5", "bits is a number up to 16, and below a format"),
        ('bits = 17\nbelow = "lut3"', "bits is a number up to 16"),
        ('bits = true\nbelow = "lut3"', "bits is a number up to 16"),
        ('bits = 3\nbelow = "lut5"', "no such weight format"),
        ('bits = 3\nbelow = "lut3"\nabove = "lut4"', "unknown entries"),
    ],
)
def test_a_mixture_that_is_none_is_refused(text, message, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(f'{text}\n[roles]\ndefault = "lut4"\n')
    with pytest.raises(UserError, match=message):
        find_recipe(str(path))


def test_options_complete_the_smaller_format_too():
    recipe = find_recipe("server", group="32", rank=2)
    assert recipe.mixture == Mixture(RATE, "lut3-g32")
    assert recipe.roles["default"] == Choice("lut4-g32", 2)
    assert recipe.formats == ("lut3-g32", "lut4-g32")


def test_a_share_of_directions_goes_by_the_shorter_side():
    choice = find_recipe("server").roles["default"]
    assert [choice.directions(shape) for shape in ((128, 4096), (2048, 768), (64, 64))] == [1, 6, 0]
    assert Choice("lut4", 40).directions((64, 100)) == 32


def matrices() -> list[np.ndarray]:
    """Of each role one of the built-in model, in fp16."""
    model = open_model(demo_checkpoint())
    one_each = {source.role: source for source in model.sources.values() if source.role}
    return [model.checkpoint.read(source) for source in one_each.values() if source.shape[0] < 999]


def test_the_residual_of_directions_obeys_eckart_and_young():
    """No residual of that rank is smaller than the singular values left out; ours is near that."""
    for weight in matrices():
        values = np.linalg.svd(weight.astype(np.float64), compute_uv=False)
        before = np.inf
        for rank in (1, 2, 4, 16):
            residual = np.linalg.norm(split_directions(weight, rank).remainder.astype(np.float64))
            least = math.sqrt((values[rank:] ** 2).sum())
            assert least * (1 - 1e-3) <= residual <= least * 1.02
            assert residual < before
            before = residual


def test_the_mixture_loses_less_than_its_smaller_format_and_more_than_its_larger_one(converted):
    recipe = read_manifest(converted).recipe
    assert set(recipe["overrides"].values()) == {"lut3"}
    for weight in matrices():
        wide, errors = weight.astype(np.float32), {}
        parts = split_directions(weight, 1)
        apart = parts.out.astype(np.float32) @ parts.into.astype(np.float32)
        for name in ("int8", "lut4", "lut3", "apple2"):
            plain = expand(find_format(name).encode(weight)).astype(np.float32)
            rest = expand(find_format(name).encode(parts.remainder)).astype(np.float32)
            errors[name] = np.square(plain - wide).sum(), np.square(rest + apart - wide).sum()
        assert errors["int8"] < errors["lut4"] < errors["lut3"] < errors["apple2"]
        assert all(with_directions < plain for plain, with_directions in errors.values())
