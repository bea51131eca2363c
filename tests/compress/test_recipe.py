"""Which matrix gets which format."""

from dataclasses import replace

import pytest

from ane_moe.compress.recipe import Choice, find_recipe, presets
from ane_moe.errors import UserError

EXPERT, ATTENTION = "layers.3.ffn.experts.7.down.weight", "layers.3.attn.q.weight"
ALWAYS_FP16 = ["embed.weight", "head.norm.weight"] + [f"layers.0.{name}" for name in (
    "ffn.router.weight", "attn.norm.weight", "attn.q_norm.weight", "ffn.shared_gate.weight", "attn.q.bias",
    "ffn.norm.weight")]  # fmt: skip


@pytest.mark.parametrize("recipe", ["int8", "lut4", "apple2", "safe", "small", "tiny"])
def test_what_decides_the_routing_stays_fp16(recipe):
    assert {find_recipe(recipe).choice(name) for name in ALWAYS_FP16} == {Choice()}


def test_presets_are_as_documented():
    assert presets() == ("safe", "small", "tiny")
    assert find_recipe("safe").choice(EXPERT).format == find_recipe("safe").choice("head.weight").format == "int8"
    assert find_recipe("small").choice(EXPERT).format == "lut4"
    assert find_recipe("small").choice(ATTENTION).format == "int8"
    assert find_recipe("tiny").choice(EXPERT) == Choice("apple2", 16)
    assert find_recipe("tiny").choice(ATTENTION).format == "lut4"


def test_the_most_specific_entry_counts_and_layers_come_first(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('[roles]\ndefault = "int8"\nexperts = "lut4"\n"experts.down" = { format = "lut6", rank = 2 }\n'
                    '[[layers]]\nlayers = "0-1,3"\nroles = { attention = "fp16", "experts.down" = "lut3" }\n')
    recipe = find_recipe(str(path))
    assert recipe.name == "mine"
    assert recipe.choice("layers.2.ffn.experts.0.down.weight") == Choice("lut6", 2)
    assert recipe.choice("layers.2.ffn.experts.0.up.weight") == Choice("lut4")
    assert recipe.choice(EXPERT) == Choice("lut3") and recipe.choice(ATTENTION) == Choice("fp16")
    assert recipe.choice("layers.2.attn.q.weight") == recipe.choice("head.weight") == Choice("int8")
    assert recipe.choice("layers.9.ffn.shared.up.weight") == recipe.choice("layers.9.ffn.up.weight") == Choice("int8")


def test_the_embedding_is_only_compressed_by_name(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('[roles]\ndefault = "lut4"\nembedding = "int8"\n')
    assert find_recipe(str(path), rank=3).choice("embed.weight") == Choice("int8")
    for wrong in ('"lut4"', '{ format = "int8", rank = 2 }'):
        path.write_text(f"[roles]\nembedding = {wrong}\n")
        with pytest.raises(UserError, match="the embedding is stored as fp16 or int8"):
            find_recipe(str(path))


def test_options_complete_what_names_leave_open():
    assert find_recipe("lut4", group="32").name == "lut4-g32"
    assert find_recipe("lut4", group="tensor", vector=2).choice(EXPERT).format == "lut4-tensor-v2"
    assert find_recipe("lut4+scale", group="tensor").choice(EXPERT).format == "lut4-tensor+scale"
    assert find_recipe("small", group="8").choice(EXPERT).format == "lut4-g8"
    assert find_recipe("small", group="8").name == "small"
    assert find_recipe("apple2", rank=4).choice(EXPERT) == Choice("apple2", 4)
    assert find_recipe("tiny", rank=0).choice(EXPERT) == Choice("apple2", 0)


def test_a_recipe_names_every_format_that_a_package_may_hold():
    assert find_recipe("int8").formats == ("int8",)
    assert find_recipe("tiny").formats == ("apple2", "int8", "lut4")
    assert replace(find_recipe("int8"), overrides={"head.weight": "lut6"}).formats == ("int8", "lut6")


@pytest.mark.parametrize("text", [
    "x = 1", "[roles]", '[roles]\nrouter = "int8"', '[roles]\ndefault = "int5"', "[roles]\ndefault = 3", "[roles",
    "roles = 1", '[roles]\ndefault = { format = "int8", rank = -1 }', "[roles]\ndefault = { rank = 1 }",
    "layers = 3\n[roles]\nhead = 'int8'",
    '[roles]\ndefault = "int8"\n[[layers]]\nlayers = 3\nroles = { head = "int8" }',
    '[roles]\ndefault = "int8"\n[[layers]]\nlayers = "x"\nroles = { head = "int8" }',
])  # fmt: skip
def test_a_bad_file_is_one_clear_error(tmp_path, text):
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(UserError):
        find_recipe(str(tmp_path / "bad.toml"))


def test_a_missing_file_and_a_senseless_rank_are_errors(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        find_recipe(str(tmp_path / "none.toml"))
    with pytest.raises(UserError, match="--recover-rank"):
        find_recipe("apple2", rank=-1)
