"""`ane-moe plan` against calculations by hand, and against the plan that `convert` makes."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from ane_moe.cli import app
from ane_moe.conversion.pipeline import plan
from ane_moe.conversion.plan import ConvertOptions, sources_of
from ane_moe.conversion.planner import make_plan
from ane_moe.errors import UserError
from ane_moe.families import describe_config
from ane_moe.families.approximate import approximate
from ane_moe.forecast.layer_kinds import plan_kinds
from ane_moe.forecast.outlook import Outlook, outlook, outlook_of, recommendation, weights_in_shards
from ane_moe.forecast.workload import Workload, workload_of_plan
from ane_moe.formats.recipe import find_recipe
from ane_moe.model.spec import MlpSpec
from tests.forecast.hub_configs import (
    DEEPSEEK_V2_LITE,
    GPT_OSS_20B,
    LFM2_8B_A1B,
    LONGCAT_FLASH,
    OLMOE,
    QWEN3_30B,
    QWEN3_235B,
    QWEN15_MOE,
    ZAYA1_8B,
)

PAGE = Path(__file__).parents[2] / "docs" / "cost-model.md"


@dataclass(frozen=True)
class ByHand:
    """Weights in 1e6: attention (or other mixer) of all layers, dense layers, experts of one layer,
    one expert, head. Then MoE layers, k, all layers, parts of a MoE layer at int8 and 220 MB, and
    slices of the head."""

    config: dict
    mixers: float
    dense: float
    experts: float
    expert: float
    head: float
    moe_layers: int
    k: int
    layers: int
    parts: int
    slices: int


ZAYA_ROUTER = 256 * 2048 + 2 * 256**2 + 17 * 256

# fmt: off
BY_HAND = {
    "Qwen3-30B-A3B": ByHand(QWEN3_30B, 48 * (2048 * (32 + 4 + 4 + 32) * 128) / 1e6, 0, 128 * 3 * 2048 * .768 / 1e3,
                            3 * 2048 * .768 / 1e3, 151.936 * 2.048, 48, 8, 48, 4, 16),
    "ZAYA1-8B": ByHand(ZAYA1_8B, 40 * (2048 * 20 * 128 + 1280 * 256 + ZAYA_ROUTER) / 1e6, 0, 16 * 3 * 2.048**2,
                       3 * 2.048**2, 262.272 * 2.048, 40, 1, 40, 1, 24),
    "LFM2-8B-A1B": ByHand(LFM2_8B_A1B, 18 * 4 * 2.048**2 + 6 * 2.048 * (32 + 8 + 8 + 32) * .064, 2 * 3 * 2.048 * 7.168,
                          32 * 3 * 2.048 * 1.792, 3 * 2.048 * 1.792, 65.536 * 2.048, 22, 4, 24, 2, 4),
    "gpt-oss-20b": ByHand(GPT_OSS_20B, 24 * 2.880 * (64 + 8 + 8 + 64) * .064, 0, 32 * 3 * 2.880**2,
                          3 * 2.880**2, 201.088 * 2.880, 24, 4, 24, 4, 16),
    "OLMoE-1B-7B": ByHand(OLMOE, 16 * 4 * 2.048**2, 0, 64 * 3 * 2.048 * 1.024,
                          3 * 2.048 * 1.024, 50.304 * 2.048, 16, 8, 16, 2, 4),
}
# fmt: on


def found(config: dict, routing: str, recipe: str = "int8") -> Workload:
    choices = outlook_of(config, recipes=[recipe]).choices
    return next(choice.workload for choice in choices if choice.routing == routing)


@pytest.mark.parametrize("name", BY_HAND)
def test_sizes_and_calls_agree_with_a_calculation_by_hand(name):
    """int8 weights take a byte each and a little more; routers, norms and short convolutions, in
    fp16, are below one percent."""
    hand = BY_HAND[name]
    dense_layers = hand.layers - hand.moe_layers
    weights = hand.mixers + hand.dense + hand.moe_layers * hand.experts + hand.head
    assert weights_in_shards(approximate(hand.config).spec) / 1e6 == pytest.approx(
        weights, rel=0.005
    )
    masked, sparse = found(hand.config, "masked"), found(hand.config, "sparse")
    assert masked.weight_bytes_per_token.expected / 1e6 == pytest.approx(weights, rel=0.01)
    active = hand.mixers + hand.dense + hand.moe_layers * hand.k * hand.expert + hand.head
    assert sparse.weight_bytes_per_token.expected / 1e6 == pytest.approx(active, rel=0.05)
    assert (
        masked.calls_per_token.expected
        == hand.layers + dense_layers + hand.moe_layers * hand.parts + hand.slices
    )
    assert (
        sparse.calls_per_token.expected
        == hand.layers + dense_layers + hand.moe_layers * hand.k + hand.slices
    )


@pytest.mark.parametrize("name", BY_HAND)
def test_the_page_gives_the_same_figures(name):
    masked, sparse = found(BY_HAND[name].config, "masked"), found(BY_HAND[name].config, "sparse")
    cells = [f"{outlook_of(BY_HAND[name].config, recipes=[]).weights / 1e6:,.0f}"]
    for work in (masked, sparse):
        cells += [
            f"{work.weight_bytes_per_token.expected / 1e6:,.0f}",
            f"{work.calls_per_token.expected:.0f}",
        ]
    assert f"| {name} | {' | '.join(cells)} |" in PAGE.read_text()


TWO_LAYERS_EACH = """
[roles]
default = "int8"

[[layers]]
layers = "0,5"
roles = { experts = "lut4", attention = { format = "lut4", rank = 8 } }
"""


@pytest.mark.parametrize("routing", ["masked", "sparse"])
@pytest.mark.parametrize("recipe", ["fp16", "small", "layers.toml"])
@pytest.mark.parametrize(
    "config",
    [
        OLMOE | {"num_hidden_layers": 6},
        QWEN15_MOE
        | {
            "num_hidden_layers": 6,
            "mlp_only_layers": [1, 2],
            "use_sliding_window": True,
            "max_window_layers": 3,
        },
    ],
    ids=lambda config: config["model_type"],
)
def test_a_plan_of_one_layer_of_each_kind_stands_for_the_plan_that_convert_makes(
    tmp_path, config, recipe, routing
):
    (tmp_path / "layers.toml").write_text(TWO_LAYERS_EACH)
    named = str(tmp_path / recipe) if recipe.endswith(".toml") else recipe
    options = ConvertOptions(routing=routing, recipe=find_recipe(named))
    spec = describe_config(config)
    kinds, whole = plan_kinds(spec, options), make_plan(spec, sources_of(spec), options)
    assert len(kinds.plan.layers) < len(whole.layers) == sum(kinds.repeats.values())
    assert workload_of_plan(kinds.plan, kinds.repeats) == workload_of_plan(whole)


def test_latent_attention_and_shared_experts_are_counted():
    """DeepSeek-V2-Lite has 15.7e9 weights, 0.21e9 of them the embedding; its cache holds 576 values
    a token."""
    near = approximate(DEEPSEEK_V2_LITE)
    assert weights_in_shards(near.spec) / 1e9 == pytest.approx(15.7 - 0.21, rel=0.01)
    mixers = [layer.mixer for layer in near.spec.layers]
    assert {2 * mixer.kv_heads * mixer.head_dim for mixer in mixers} == {576}
    assert [isinstance(layer.ffn, MlpSpec) for layer in near.spec.layers] == [True] + [False] * 26
    assert "latent attention is counted as attention of the same size" in near.notes
    sparse = found(DEEPSEEK_V2_LITE, "sparse")
    assert {call.kind: call.count.expected for call in sparse.decode}["shared"] == 26


def test_longcat_has_its_weights():
    """560e9, of which 27e9 are active on average: of 12 experts chosen, a third compute nothing."""
    spec = describe_config(LONGCAT_FLASH)
    assert sum(math.prod(row.shape) for _, row in spec.distinct_weights()) / 1e9 == pytest.approx(
        560, rel=0.005
    )
    active = found(LONGCAT_FLASH, "sparse").weight_bytes_per_token.expected
    assert active / 1e9 == pytest.approx(27, rel=0.05)


@pytest.mark.parametrize(
    ("config", "said"), [(LFM2_8B_A1B, "short convolutions"), (ZAYA1_8B, "the inner layers")]
)
def test_a_part_that_stands_for_another_is_of_its_size_and_said(config, said):
    """LFM2's convolutions have 4 d^2 weights; ZAYA's routers 0.66e6, of which 16 x 2048 are a
    router's here."""
    near = approximate(config)
    assert any(note.startswith(said) for note in near.notes)
    first = near.spec.layers[0]
    size = sum(math.prod(row.shape) for row in first.mixer.rows(2048) if row.role)
    router = ZAYA_ROUTER - 16 * 2048
    by_hand = 4 * 2048**2 if config is LFM2_8B_A1B else 2 * 2048 * 10 * 128 + router
    assert size == pytest.approx(by_hand, rel=0.01)


def test_small_expert_functions_are_said_to_leave_the_engine_and_are_not_recommended():
    config = QWEN3_30B | {"moe_intermediate_size": 128}
    chosen = outlook_of(config, recipes=["int8"])
    sparse = next(choice for choice in chosen.choices if choice.routing == "sparse")
    assert not sparse.stays and any(
        c.rule == "cost-small" and c.kind == "experts" for c in sparse.concerns
    )
    assert "--routing masked" in chosen.recommendation and "sparse int8" in chosen.recommendation
    assert recommendation([sparse]).startswith("None")


def test_every_prediction_in_the_sentence_has_its_range():
    sentence = outlook_of(QWEN3_30B).recommendation
    ends = re.search(r"predicted ([\d.]+) to ([\d.]+) tok/s \(expected ([\d.]+)\)", sentence)
    low, high, expected = map(float, ends.groups())
    assert low < expected < high


def test_the_largest_model_is_answered_without_its_weights():
    answer = outlook_of(QWEN3_235B)
    assert answer.weights / 1e9 == pytest.approx(235 - 0.62, rel=0.01) and len(answer.choices) == 8


def test_chips_and_formats_change_the_answer():
    def speed(answer: Outlook) -> float:
        return answer.choices[0].prediction.decode.tok_s.expected

    fast, slow = (
        outlook_of(ZAYA1_8B, recipes=["int8"]),
        outlook_of(ZAYA1_8B, recipes=["int8"], target="m1"),
    )
    assert speed(fast) > 1.5 * speed(slow)
    assert fast.supported
    mamba = {"model_type": "new_moe", "layer_types": ["mamba"] * 24}
    strange = outlook_of(GPT_OSS_20B | mamba, recipes=["fp16"])
    assert "model_type 'new_moe' is not supported" in strange.refusal and not strange.supported
    assert any("mamba" in note for note in strange.notes)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mixtral", "hidden_size": 64}, "sliding_window"),
        (QWEN3_30B | {"num_experts": None}, "num_experts"),
        (QWEN3_30B | {"num_experts_per_tok": 500}, "num_experts_per_tok"),
        (QWEN3_30B | {"hidden_size": -1}, "hidden_size"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_one_error(config, message):
    with pytest.raises(UserError, match=message):
        outlook_of(config)


def test_the_command_reads_folders_files_and_the_hub(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(OLMOE))
    asked = []

    def ask(url: str) -> None:
        if "allenai/none" in url:
            raise OSError("no network\nmore")

    def fetch(name: str, file: str, revision: str | None) -> str:
        asked.append((name, file))
        return str(tmp_path / "config.json")

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file, revision: None)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", ask)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    documents = []
    for source in (tmp_path, tmp_path / "config.json", "allenai/OLMoE"):
        result = CliRunner().invoke(app, ["plan", str(source), "--json"])
        assert result.exit_code == 0, result.output
        documents.append(json.loads(result.stdout))
    assert documents[0] == documents[1] == documents[2] and asked == [
        ("allenai/OLMoE", "config.json")
    ]
    first = documents[0]["choices"][0]["prediction"]
    assert first["kind"] == "predicted" and set(first["memory_bytes"]) == {
        "low",
        "expected",
        "high",
    }
    with pytest.raises(UserError, match=r"allenai/none cannot be fetched.*no network; give"):
        outlook("allenai/none")
    with pytest.raises(UserError, match=r"has no config\.json"):
        outlook(tmp_path / "nothing" / "here" / "at-all")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="not a JSON object"):
        outlook(tmp_path)


def without(config: dict, *names: str) -> dict:
    return {name: value for name, value in config.items() if name not in names}


# What convert refuses at once, and what it says of it.
REFUSED = {
    "torchao": (
        QWEN3_30B | {"quantization_config": {"quant_method": "torchao"}},
        "is quantised (torchao",
    ),
    "bitsandbytes": (
        QWEN3_30B | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        "is quantised (bitsandbytes 8 bit",
    ),
    "no norm_topk_prob": (without(QWEN3_30B, "norm_topk_prob"), "lacks norm_topk_prob"),
    "no rope_theta": (without(QWEN3_30B, "rope_theta"), "lacks rope_theta"),
    "no tie_word_embeddings": (
        without(QWEN3_30B, "tie_word_embeddings"),
        "lacks tie_word_embeddings",
    ),
    "no kv heads": (QWEN3_30B | {"num_key_value_heads": None}, "lacks num_key_value_heads"),
    "nested": (
        {"model_type": "new_moe_of_images", "text_config": QWEN3_30B},
        "'new_moe_of_images' is not supported",
    ),
    "deepseek": (
        DEEPSEEK_V2_LITE | {"model_type": "new_latent_moe"},
        "'new_latent_moe' is not supported",
    ),
    "unheard of": (OLMOE | {"model_type": "new_moe"}, "'new_moe' is not supported"),
}


def test_a_form_that_convert_decodes_is_no_obstacle(tmp_path):
    """gpt-oss as it is published: experts in MXFP4."""
    yarn = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0}
    config = GPT_OSS_20B | {
        "attention_bias": True,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000,
        "rope_scaling": yarn | {"original_max_position_embeddings": 4096, "truncate": False},
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "quantization_config": {"quant_method": "mxfp4"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = outlook(tmp_path, recipes=("int8",))
    assert found.refusal == "" and found.choices


@pytest.mark.parametrize("case", REFUSED)
def test_what_convert_refuses_is_not_approved_and_the_first_line_says_why(tmp_path, case):
    config, reason = REFUSED[case]
    (tmp_path / "config.json").write_text(json.dumps(config))
    shown = CliRunner().invoke(app, ["plan", str(tmp_path), "--compress", "int8"]).stdout
    first, second = shown.splitlines()[:2]
    assert (
        first.startswith("not supported: ") and reason in first and second.endswith("approximate")
    )
    assert "Take --routing" not in shown and shown.rstrip().splitlines()[-1].startswith("None: ")
    result = CliRunner().invoke(app, ["plan", str(tmp_path), "--compress", "int8", "--json"])
    document = json.loads(result.stdout)
    assert (
        result.exit_code == 0 and document["supported"] is False and document["approximate"] is True
    )
    assert reason in document["reason"] and document["recommendation"].startswith("None: ")
    assert document["choices"] and document["model_type"] == config["model_type"]


def test_the_reason_is_the_one_that_convert_gives(tmp_path):
    """Of the weights too, where the folder has them: one tensor too many, which no config.json
    shows."""
    config = without(QWEN3_30B, "norm_topk_prob") | {"num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"model.strange.weight": np.zeros(1, np.float16)}, tmp_path / "model.safetensors")
    for added in ({}, {"norm_topk_prob": True}):
        (tmp_path / "config.json").write_text(json.dumps(config | added))
        with pytest.raises(UserError) as refused:
            plan(tmp_path, ConvertOptions())
        assert outlook(tmp_path, recipes=["int8"]).refusal == str(refused.value)


def test_a_whole_checkpoint_is_supported_and_recommended(small_checkpoint):
    answer = outlook(small_checkpoint, recipes=["int8"])
    assert answer.supported and answer.as_json()["reason"] is None and not answer.notes


def test_a_dense_model_is_said_to_be_no_mixture_of_experts(tmp_path):
    dense = without(QWEN3_30B, "num_experts", "num_experts_per_tok") | {"model_type": "qwen3"}
    (tmp_path / "config.json").write_text(json.dumps(dense))
    shown = CliRunner().invoke(app, ["plan", str(tmp_path)])
    first, *rest = shown.stdout.splitlines()
    assert shown.exit_code == 0 and first.startswith(
        "not supported: qwen3 is not a mixture of experts"
    )
    assert [line for line in rest if not line.startswith("None: ")] == []
    document = outlook(tmp_path).as_json()
    assert not document["supported"] and document["choices"] == [] and document["weights"] is None


def test_a_model_whose_fields_have_other_names_is_answered_without_a_forecast():
    other = {
        "model_type": "new_moe",
        "d_model": 6144,
        "ffn_config": {"moe_num_experts": 16, "moe_top_k": 4},
    }
    answer = outlook_of(other)
    assert "'new_moe' is not supported" in answer.refusal and answer.choices == ()
    assert "num_hidden_layers" in answer.notes[0] or "hidden_size" in answer.notes[0]


def test_a_family_s_model_without_experts_is_planned_as_convert_takes_it():
    config = QWEN3_30B | {"mlp_only_layers": list(range(48))}
    masked = found(config, "masked")
    assert describe_config(config).layers[0].ffn.width == 6144 and masked.packages == 48 + 48 + 16


@pytest.mark.parametrize(
    "config", [QWEN3_30B, OLMOE, QWEN15_MOE], ids=lambda config: config["model_type"]
)
def test_both_readers_of_a_config_give_the_same_matrices(config):
    exact, near = (
        [(name, row.shape) for name, row in spec.weights() if row.role]
        for spec in (describe_config(config), approximate(config).spec)
    )
    assert exact == near


def test_concerns_are_of_formats_and_states_too_on_the_system_asked_for():
    def rules(target: str, os: int, recipe: str) -> set[str]:
        (choice, _) = outlook_of(QWEN3_30B, recipes=[recipe], target=target, os=os).choices
        return {concern.rule for concern in choice.concerns if concern.function_bytes is None}

    assert rules("m4-max", 26, "lut4") == {"palette-os-26"}
    assert rules("m2", 15, "lut4") == {"state-access"}
    assert rules("m5-max", 26, "int8") == {"stateful-m5", "state-access"}
    assert "per-block-weight" in rules("m4-max", 26, "int4-block32")


def test_the_recommendation_names_what_is_undecided():
    sentence = outlook_of(QWEN3_30B, recipes=["lut4"]).recommendation
    assert "placement is undecided (palette-os-26" in sentence


@pytest.mark.parametrize(
    "config",
    [
        OLMOE
        | {
            "hidden_size": 64,
            "num_hidden_layers": 1,
            "num_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size": 32,
            "vocab_size": 256,
        },
        OLMOE
        | {
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "intermediate_size": 128,
            "vocab_size": 4096,
        },
        QWEN3_30B,
    ],
)
@pytest.mark.parametrize("target", ["m1", "m5-max"])
def test_no_column_is_cut_in_80_columns(tmp_path, monkeypatch, config, target):
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "config.json").write_text(json.dumps(config))
    shown = CliRunner().invoke(app, ["plan", str(tmp_path), "--target", target]).stdout
    sizes, speeds, loads = re.split(
        "Predicted, low-expected-high|Loading and energy, predicted", shown
    )
    figure = r"\d[\d.,]*[kM]?"
    for text, head, ranges in (
        (sizes, "routing weights disk", 1),
        (speeds, "routing weights tok/s", 3),
        (loads, "routing weights first load", 3),
    ):
        rows = [line.rstrip() for line in text.splitlines() if re.match(r"(masked|sparse) ", line)]
        assert head in text and len(rows) == 8 and max(map(len, rows)) <= 80
        assert all(
            len(re.findall(rf"\b{figure}-{figure}-{figure}(?= |$)", row)) == ranges for row in rows
        )


@pytest.mark.parametrize("width", ["80", "200"])
def test_the_table_never_shows_a_speed_without_its_range(tmp_path, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", width)
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B))
    result = CliRunner().invoke(app, ["plan", str(tmp_path), "--compress", "fp16,int8,lut4-g8-v2"])
    assert result.exit_code == 0 and "predicted, not measured" in result.stdout
    texts = re.split("Predicted, low-expected-high|Loading and energy, predicted", result.stdout)
    rows = [
        [line for line in text.splitlines() if re.match(r"(masked|sparse) ", line)]
        for text in texts
    ]
    assert [len(lines) for lines in rows] == [6, 6, 6]
    assert all("not timed" in line for line in rows[0] if "lut4-g8-v2" in line)
    end = r"\d[\d.,]*"
    assert all(len(re.findall(rf"{end}-{end}-{end}", line)) == 3 for line in rows[1])
    assert all(len(re.findall(rf"{end}-{end}-{end}", line)) == 3 for line in rows[2])
    assert "…" not in result.stdout and max(len(line.rstrip()) for line in rows[0] + rows[1]) <= 80
