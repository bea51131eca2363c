"""Which matrix gets which format."""

from dataclasses import replace

import pytest

from ane_moe.errors import UserError
from ane_moe.formats.recipe import Choice, find_recipe, presets
from ane_moe.model.spec import (
    GqaSpec,
    HeadSpec,
    LayerSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    NormSpec,
    RouterSpec,
    SharedSpec,
)

NORM = NormSpec()
GQA = GqaSpec(4, 2, 8, scale=1.0, rope=None, qkv_bias=True, o_bias=True, qk_norm="head")
MOE = MoeSpec(RouterSpec(8, 2), MlpSpec(24), SharedSpec(MlpSpec(8), gated=True))
SPEC = ModelSpec(
    "any",
    32,
    100,
    64,
    NORM,
    (LayerSpec(GQA, MOE), LayerSpec(GQA, MlpSpec(40))) * 5,
    HeadSpec(False),
    {},
)
ROWS = {str(name): (name, row.role) for name, row in SPEC.weights()}
EXPERT, ATTENTION, HEAD = (
    "layers.4.ffn.experts.7.down.weight",
    "layers.4.attn.q.weight",
    "head.rows.weight",
)
MATRICES = ("q", "k", "v", "o", "gate", "up", "down", "rows")


def choice(recipe, tensor):
    return recipe.choice(*ROWS[tensor])


@pytest.mark.parametrize("recipe", ["int8", "lut4", "apple2", "safe", "server", "small", "tiny"])
def test_what_decides_the_routing_stays_fp16(recipe):
    matrices = tuple(f".{name}.weight" for name in MATRICES)
    plain = [tensor for tensor in ROWS if not tensor.endswith(matrices)]
    assert {
        "embed.weight",
        "layers.0.ffn.router.weight",
        "layers.0.ffn.shared_gate.weight",
        "layers.0.attn.q.bias",
        "layers.0.attn.q_norm.weight",
        "head.norm.weight",
    } < set(plain)
    assert {choice(find_recipe(recipe), tensor) for tensor in plain} == {Choice()}
    assert all(choice(find_recipe(recipe), tensor) != Choice() for tensor in ROWS.keys() - plain)


def test_presets_are_as_documented():
    assert presets() == ("safe", "server", "small", "tiny")
    assert (
        choice(find_recipe("safe"), EXPERT).format
        == choice(find_recipe("safe"), HEAD).format
        == "int8"
    )
    assert choice(find_recipe("small"), EXPERT).format == "lut4"
    assert choice(find_recipe("small"), ATTENTION).format == "int8"
    assert choice(find_recipe("tiny"), EXPERT) == Choice("apple2", 16)
    assert choice(find_recipe("tiny"), ATTENTION).format == "lut4"


def test_the_most_specific_entry_counts_and_layers_come_first(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        '[roles]\ndefault = "int8"\nexperts = "lut4"\n"experts.down" = { format = "lut6", rank = 2 }\n'
        '[[layers]]\nlayers = "0-1,4"\nroles = { attention = "fp16", "experts.down" = "lut3" }\n'
    )
    recipe = find_recipe(str(path))
    assert recipe.name == "mine"
    assert choice(recipe, "layers.2.ffn.experts.0.down.weight") == Choice("lut6", 2)
    assert choice(recipe, "layers.2.ffn.experts.0.up.weight") == Choice("lut4")
    assert choice(recipe, EXPERT) == Choice("lut3") and choice(recipe, ATTENTION) == Choice("fp16")
    assert choice(recipe, "layers.2.attn.q.weight") == choice(recipe, HEAD) == Choice("int8")
    assert choice(recipe, "layers.8.ffn.shared.up.weight") == Choice("int8")
    assert choice(recipe, "layers.9.ffn.mlp.up.weight") == Choice("int8")


def test_the_embedding_is_only_compressed_by_name(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('[roles]\ndefault = "lut4"\nembedding = "int8"\n')
    assert choice(find_recipe(str(path), rank=3), "embed.weight") == Choice("int8")
    for wrong in ('"lut4"', '{ format = "int8", rank = 2 }'):
        path.write_text(f"[roles]\nembedding = {wrong}\n")
        with pytest.raises(UserError, match="the embedding is stored as fp16 or int8"):
            find_recipe(str(path))


def test_options_complete_what_names_leave_open():
    assert find_recipe("lut4", group="32").name == "lut4-g32"
    assert choice(find_recipe("lut4", group="tensor", vector=2), EXPERT).format == "lut4-tensor-v2"
    assert choice(find_recipe("lut4+scale", group="tensor"), EXPERT).format == "lut4-tensor+scale"
    assert choice(find_recipe("small", group="8"), EXPERT).format == "lut4-g8"
    assert find_recipe("small", group="8").name == "small"
    assert choice(find_recipe("apple2", rank=4), EXPERT) == Choice("apple2", 4)
    assert choice(find_recipe("tiny", rank=0), EXPERT) == Choice("apple2", 0)


def test_a_recipe_names_every_format_that_a_package_may_hold():
    assert find_recipe("int8").formats == ("int8",)
    assert find_recipe("tiny").formats == ("apple2", "int8", "lut4")
    assert replace(find_recipe("int8"), overrides={HEAD: "lut6"}).formats == ("int8", "lut6")


@pytest.mark.parametrize(
    "text",
    [
        "x = 1",
        "[roles]",
        '[roles]\nrouter = "int8"',
        '[roles]\ndefault = "int5"',
        "[roles]\ndefault = 3",
        "[roles",
        "roles = 1",
        '[roles]\ndefault = { format = "int8", rank = -1 }',
        "[roles]\ndefault = { rank = 1 }",
        "layers = 3\n[roles]\nhead = 'int8'",
        '[roles]\ndefault = "int8"\n[[layers]]\nlayers = 3\nroles = { head = "int8" }',
        '[roles]\ndefault = "int8"\n[[layers]]\nlayers = "x"\nroles = { head = "int8" }',
    ],
)
def test_a_bad_file_is_one_clear_error(tmp_path, text):
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(UserError):
        find_recipe(str(tmp_path / "bad.toml"))


def test_a_missing_file_and_a_senseless_rank_are_errors(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        find_recipe(str(tmp_path / "none.toml"))
    with pytest.raises(UserError, match="--recover-rank"):
        find_recipe("apple2", rank=-1)
