"""Templates on disk: found again, and never believed."""

import json
import os
from pathlib import Path

import pytest

from ane_moe.conversion.templates import templates_of
from ane_moe.emit.coreml import template_cache, tracing
from ane_moe.emit.coreml.template import Template
from ane_moe.emit.coreml.template_cache import SUFFIX, TemplateCache
from ane_moe.emit.coreml.tracing import make_template
from ane_moe.model.mlp import DenseConfig
from ane_moe.model.spec import MlpSpec, NormSpec
from ane_moe.model.template_key import TemplateKey

KEY = TemplateKey(DenseConfig(16, NormSpec(1e-6), MlpSpec(24)), (("decode", 1),))
OTHER = TemplateKey(KEY.block, (("decode", 1), ("prefill", 4)))


@pytest.fixture
def cache(tmp_path: Path) -> TemplateCache:
    return TemplateCache(tmp_path / "templates")


@pytest.fixture(scope="module")
def template() -> Template:
    return make_template(KEY)


def entry(cache: TemplateCache) -> Path:
    (only,) = cache.entries()
    return only.path


def test_what_was_kept_is_found_again_and_nothing_else(
    cache: TemplateCache, template: Template
) -> None:
    assert cache.find(KEY) is None
    cache.keep(KEY, template)
    assert cache.find(KEY) == template
    assert cache.find(OTHER) is None
    assert [path.suffix for path in cache.folder.iterdir()] == [SUFFIX]


def test_a_second_model_of_the_same_geometry_traces_nothing(
    cache: TemplateCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = dict(templates_of([KEY], cache))
    monkeypatch.setattr(tracing, "make_template", None)
    assert dict(templates_of([KEY], cache)) == first == {KEY: make_template(KEY)}


@pytest.mark.parametrize("damage", ["cut", "flipped", "not JSON", "of another key", "no weights"])
def test_a_damaged_entry_is_ignored_and_made_anew(
    cache: TemplateCache, template: Template, damage: str
) -> None:
    cache.keep(KEY, template)
    path = entry(cache)
    line, _, model = path.read_bytes().partition(b"\n")
    about = json.loads(line)
    if damage == "cut":
        model = model[:-1]
    elif damage == "flipped":
        model = bytes([model[0] ^ 1]) + model[1:]
    elif damage == "not JSON":
        line = line[:-1]
    elif damage == "of another key":
        line = json.dumps(about | {"key": repr(OTHER)}).encode()
    else:
        line = json.dumps(about | {"weights": {}}).encode()
    path.write_bytes(line + b"\n" + model)
    assert cache.find(KEY) is None
    assert dict(templates_of([KEY], cache)) == {KEY: template} == {KEY: cache.find(KEY)}


def test_another_source_of_our_parts_is_another_template(
    cache: TemplateCache, template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.keep(KEY, template)
    monkeypatch.setattr(template_cache, "_source", lambda names: "edited")
    assert cache.find(KEY) is None


def test_the_ones_not_used_for_longest_go(
    cache: TemplateCache, template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_cache, "MOST", 1)
    cache.keep(KEY, template)
    os.utime(entry(cache), (0, 0))
    cache.keep(OTHER, template)
    assert (cache.find(KEY), len(cache.entries())) == (None, 1)
    assert cache.clear() and not cache.entries()


def test_a_folder_that_cannot_be_written_to_keeps_nothing(
    tmp_path: Path, template: Template
) -> None:
    (tmp_path / "file").write_text("")
    cache = TemplateCache(tmp_path / "file" / "templates")
    cache.keep(KEY, template)
    assert cache.find(KEY) is None
