"""Traces against Hugging Face's own routing, from a checkpoint and from every kind of shards."""

import json
from io import StringIO

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from ane_moe.cli import app
from ane_moe.errors import UserError
from ane_moe.formats.recipe import INT8
from ane_moe.loop.eviction import POLICIES
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from ane_moe.report.routing_table import trace_table
from ane_moe.routing.recorder import record
from ane_moe.routing.routing_trace import LayerRouting, RoutingTrace, read_trace, write_trace
from ane_moe.routing.statistics import summarise
from ane_moe.routing.traffic import expert_traffic
from tests.models import LLAMA_SHAPED, make_model, save_checkpoint
from tests.verification.tiny import tiny_conversion, tiny_model

WINDOW = 20
PROMPTS = [
    np.random.default_rng(1).integers(3, 60, 45).tolist(),
    [7, 8, 9],
]  # passages of 20, 20, 5 and 3
NEAR_TIE = 0.03  # in logits: what fp16 may turn


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "prompts.json"
    path.write_text(json.dumps(PROMPTS))
    return path


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return tiny_model("qwen3_moe", num_hidden_layers=2, max_position_embeddings=128)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    return save_checkpoint(model, tmp_path_factory.mktemp("traced") / "checkpoint")


@pytest.fixture(scope="module")
def traced(checkpoint, prompts):
    return record(checkpoint, prompts, window=WINDOW)


@pytest.fixture(scope="module")
def sparse(checkpoint, tmp_path_factory):
    return tiny_conversion(
        checkpoint,
        tmp_path_factory.mktemp("traced") / "sparse",
        routing="sparse",
        expert_tokens=(1,),
    )


def passages():
    return [
        prompt[first : first + WINDOW]
        for prompt in PROMPTS
        for first in range(0, len(prompt), WINDOW)
    ]


def router_logits(model):
    """Of all layers, `[N,E]`, by the model's own output."""
    with torch.no_grad():
        each = [
            model(torch.tensor([ids]), output_router_logits=True).router_logits
            for ids in passages()
        ]
    return [torch.cat(layer).numpy() for layer in zip(*each, strict=True)]


@pytest.mark.parametrize("family", LLAMA_SHAPED)
def test_a_checkpoints_trace_is_hugging_faces_own_routing(family, tmp_path, prompts):
    model = make_model(family)
    found = record(save_checkpoint(model, tmp_path), prompts, window=WINDOW)
    assert found.tokens.tolist() == [identifier for passage in passages() for identifier in passage]
    assert found.starts.tolist() == [0, 20, 40, 45] and found.family == family
    for layer, logits in zip(found.layers.values(), router_logits(model), strict=True):
        k = layer.chosen.shape[1]
        top = np.sort(logits, 1)[:, ::-1][:, :k]
        np.testing.assert_allclose(
            np.take_along_axis(logits, layer.chosen.astype(int), 1), top, atol=1e-4
        )
        expected = np.exp(top - top.max(1, keepdims=True))
        np.testing.assert_allclose(
            layer.weights / layer.weights.sum(1, keepdims=True),
            expected / expected.sum(1, keepdims=True),
            rtol=1e-4,
        )
        assert layer.experts == logits.shape[1]


@pytest.mark.parametrize("family", ["lfm2_moe", "zaya"])
def test_a_trace_has_the_routers_own_choices_and_weights(family, tmp_path, prompts):
    model = make_model(family)
    found = record(save_checkpoint(model, tmp_path), prompts, window=WINDOW)
    heard = []
    for module in model.modules():
        if type(module).__name__.endswith("Router"):
            heard.append([])
            module.register_forward_hook(lambda *call, own=heard[-1]: own.append(call[2][1:3]))
    with torch.no_grad():
        for ids in passages():
            model(torch.tensor([ids]))
    for layer, calls in zip(found.layers.values(), heard, strict=True):
        weights, chosen = (torch.cat([call[part] for call in calls]).numpy() for part in (0, 1))
        expected = np.zeros((len(weights), layer.experts))
        np.put_along_axis(expected, chosen, weights, 1)
        given = np.zeros_like(expected)
        np.put_along_axis(given, layer.chosen.astype(int), layer.weights, 1)
        np.testing.assert_allclose(given, expected, atol=1e-5)
        assert layer.experts == model.config.num_experts


@pytest.mark.parametrize(
    "options",
    [
        {"prefill": 8},
        {"routing": "sparse", "expert_tokens": (1,)},
        {"prefill": 8, "layers_per_shard": 2},
        {"prefill": 8, "routing": "soft"},
    ],
    ids=["masked", "sparse", "stack", "soft"],
)
def test_the_shards_trace_is_the_checkpoints_but_for_near_ties(
    options, model, checkpoint, traced, prompts, tmp_path
):
    out = tiny_conversion(checkpoint, tmp_path / "out", **options)
    found = record(out, prompts, window=WINDOW)
    np.testing.assert_array_equal(found.tokens, traced.tokens)
    np.testing.assert_array_equal(found.starts, traced.starts)
    assert found.layers.keys() == traced.layers.keys()
    soft = (
        options.get("routing") == "soft"
    )  # another function: from the second layer on the input differs
    for layer, logits in list(zip(traced.layers, router_logits(model), strict=True))[
        : 1 if soft else None
    ]:
        ordered = np.sort(logits, 1)[:, ::-1]
        clear = (np.diff(ordered[:, :3], axis=1) < -NEAR_TIE).all(1)
        ours, theirs = found.layers[layer], traced.layers[layer]
        assert clear.sum() > 30
        np.testing.assert_array_equal(ours.chosen[clear], theirs.chosen[clear])
        ratios = [
            one.weights[clear] / one.weights[clear].sum(1, keepdims=True) for one in (ours, theirs)
        ]
        np.testing.assert_allclose(*ratios, atol=0.02)


def test_expert_bytes_are_what_experts_take(model, checkpoint, traced, sparse, prompts):
    experts = model.model.layers[0].mlp.experts
    stored = sum(parameter.numel() for parameter in experts.parameters()) * 2 // 4
    assert {layer.expert_bytes for layer in traced.layers.values()} == {stored}
    assert {layer.expert_bytes for layer in record(sparse, prompts).layers.values()} == {stored}
    assert {layer.expert_weights for layer in record(sparse, prompts).layers.values()} == {
        stored // 2
    }


def test_an_int8_conversion_has_as_many_weights_in_fewer_bytes(
    checkpoint, traced, prompts, tmp_path
):
    out = tiny_conversion(
        checkpoint, tmp_path / "out", routing="sparse", expert_tokens=(1,), recipe=INT8
    )
    found, original = record(out, prompts).layers[0], traced.layers[0]
    assert original.expert_weights == original.expert_bytes // 2 == 3 * 24 * 24
    assert found.expert_bytes < 0.6 * original.expert_bytes
    assert found.expert_weights == pytest.approx(
        original.expert_weights, rel=0.1
    )  # scales are counted in


@pytest.mark.parametrize("policy", POLICIES)
def test_traffic_is_what_the_real_cache_counts(policy, sparse, prompts, traced):
    size = 2 * 3 * 24 * 24  # the reference runtime holds an expert's weights as they are stored
    for experts in (1, 3, 5, 8):
        shards = load_shards(
            sparse, "reference", expert_cache_bytes=experts * size, expert_policy=policy
        )
        session = Session(shards)
        for passage in passages():
            session.reset()
            for identifier in passage:
                session.decode(identifier)
        found = expert_traffic(
            record(sparse, prompts, window=WINDOW),
            experts * size,
            function_bytes=dict.fromkeys(traced.layers, size),
            policy=policy,
        )
        real = session.figures.cache
        assert (found.hits, found.misses) == (real.hits, real.misses)
        assert found.bytes_loaded_per_token * found.tokens == pytest.approx(real.bytes_loaded)
        assert found.functions_per_token == pytest.approx((real.hits + real.misses) / 48)


def test_statistics_equal_a_count_by_hand():
    chosen = np.array([[0, 1], [0, 2], [1, 2]], np.int16)
    weights = np.array(
        [[0.75, 0.25], [0.5, 0.5], [1, 0]], np.float32
    )  # the last chose one expert only
    layers = {4: LayerRouting(4, chosen, weights)}
    trace = RoutingTrace("x", "test", np.arange(3, dtype=np.int32), np.array([0, 2]), layers)
    (layer,) = summarise(trace).layers
    assert layer.usage == pytest.approx((0.4, 0.4, 0.2, 0))
    assert layer.repeated == pytest.approx(1 / 2)  # token 1 of passage 0: expert 0 again
    assert layer.top_weight == pytest.approx((0.75 + 0.5 + 1) / 3)
    assert layer.entropy == pytest.approx(-(0.8 * np.log(0.4) + 0.2 * np.log(0.2)) / np.log(4))
    assert summarise(trace).traffic == ()


# -- the file
# --------------------------------------------------------------------------------------------------


def test_a_trace_reads_back_as_written_and_is_the_same_file_each_time(traced, tmp_path):
    one, two = tmp_path / "one.npz", tmp_path / "two.npz"
    write_trace(traced, one)
    write_trace(traced, two)
    assert one.read_bytes() == two.read_bytes()
    found = read_trace(one)
    assert (found.family, found.source) == (traced.family, traced.source)
    np.testing.assert_array_equal(found.tokens, traced.tokens)
    for layer, routing in traced.layers.items():
        np.testing.assert_array_equal(found.layers[layer].chosen, routing.chosen)
        np.testing.assert_array_equal(found.layers[layer].weights, routing.weights)
        assert found.layers[layer].expert_bytes == routing.expert_bytes
        assert found.layers[layer].expert_weights == routing.expert_weights


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("format", np.array(2)),
        ("starts", np.array([0, 99])),
        ("starts", np.array([1])),
        ("starts", np.array([], int)),
        ("expert_weights", np.array([1])),
        ("expert_bytes", np.array([-1, 5])),
        ("experts", np.array([4])),
        ("layer_000.chosen", np.full((48, 2), 4, np.int16)),
        ("layer_000.chosen", np.full((48, 2), -1, np.int16)),
        ("layer_000.chosen", np.zeros((48, 2), np.int64)),
        ("layer_000.weights", np.full((48, 2), np.nan, np.float32)),
        ("layer_001.weights", np.ones((47, 2), np.float32)),
        ("layer_000.chosen", None),
        ("tokens", None),
        ("family", np.array([{"pickled": 1}], object)),
    ],
)
def test_a_damaged_trace_is_named(traced, tmp_path, name, value):
    path = tmp_path / "trace.npz"
    write_trace(traced, path)
    with np.load(path) as arrays:
        changed = {key: arrays[key] for key in arrays.files} | {name: value}
    np.savez(path, **{key: array for key, array in changed.items() if array is not None})
    with pytest.raises(UserError, match="cannot be read as a routing trace"):
        read_trace(path)


def test_a_file_that_unpacks_to_too_much_is_refused_before_it_is(traced, tmp_path, monkeypatch):
    write_trace(traced, tmp_path / "trace.npz")
    monkeypatch.setattr("ane_moe.routing.routing_trace.MAX_BYTES", 100)
    with pytest.raises(UserError, match="too large"):
        read_trace(tmp_path / "trace.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(UserError, match="cannot be read"):
        read_trace(tmp_path / "text.npz")


# -- the commands
# -------------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_trace_and_group_from_the_command_line(checkpoint, prompts, tmp_path):
    trace, grouping = tmp_path / "trace.npz", tmp_path / "grouping.json"
    result = run(
        "trace", checkpoint, "--text", prompts, "--out", trace, "--max-tokens", 30, "--json"
    )
    document = json.loads(result.stdout)
    assert (document["tokens"], document["passages"], len(document["layers"])) == (30, 1, 2)
    assert document["traffic"][-1]["misses"] <= 8 and 0 <= document["traffic"][0]["hit_rate"] <= 1
    assert "layer" in run("trace", checkpoint, "--text", prompts, "--out", trace).stdout
    found = json.loads(
        run("group", trace, "--out", grouping, "--experts-per-function", 2, "--json").stdout
    )
    assert found["functions_per_token"].keys() == {"0", "1"} and grouping.is_file()
    assert "saved" in run("group", trace, "--out", grouping, "--experts-per-function", 2).stdout
    chosen = json.loads(run("group", trace, "--out", grouping, "--target", "m1", "--json").stdout)
    assert chosen["choice"]["kind"] == "predicted" and chosen["choice"]["chip"] == "m1"
    assert [size["experts_per_function"] for size in chosen["choice"]["sizes"]] == [1, 2, 4]
    assert "PREDICTED" in run("group", trace, "--out", grouping).stdout
    for wrong in (("--experts-per-function", "0"), ("--target", "m99"), ("--format", "int9")):
        assert isinstance(run("group", trace, "--out", grouping, *wrong).exception, UserError)


@pytest.mark.parametrize("text", ["[]", "[[]]", "no json"])
def test_text_without_tokens_is_a_users_error(checkpoint, tmp_path, text):
    (tmp_path / "prompts.json").write_text(text)
    with pytest.raises(UserError):
        record(checkpoint, tmp_path / "prompts.json")


def test_a_folder_that_is_neither_is_a_users_error(tmp_path, prompts):
    with pytest.raises(UserError):
        record(tmp_path, prompts)


def test_the_overlap_of_consecutive_layers_by_hand():
    """Layers 1, 3 and 5 of four experts, and 6 of two."""
    chosen = {
        1: [[0, 1], [0, 1], [2, 3]],
        3: [[1, 0], [1, 2], [0, 1]],
        5: [[1, 2], [1, 2], [1, 2]],
        6: [[0, 1], [0, 1], [0, 1]],
    }
    weights = {layer: np.full((3, 2), 0.5, np.float32) for layer in chosen}
    weights[3][0, 1] = 0  # the first token chose expert 1 alone
    layers = {
        layer: LayerRouting(2 if layer == 6 else 4, np.array(rows, np.int16), weights[layer])
        for layer, rows in chosen.items()
    }
    trace = RoutingTrace("x", "y", np.arange(3, dtype=np.int32), np.array([0]), layers)
    summary = summarise(trace)
    first, second = summary.overlaps
    assert (first.layer, first.following, second.layer, second.following) == (1, 3, 3, 5)
    # Of the six that layer 1 chose: 1 of the first token, 1 of the second.
    assert first.share == pytest.approx(2 / 6)
    # Layer 1 chose 0, 1, 2, 3 in 2, 2, 1, 1 of 6 choices; layer 3 in 1, 3, 1, 0 of 3 tokens.
    assert first.by_chance == pytest.approx((2 * 1 + 2 * 3 + 1 * 1 + 1 * 0) / 6 / 3)
    # Of five: 1; 1 and 2; 1. Layer 5 always chose 1 and 2, which were 4 of the 5.
    assert second.share == second.by_chance == pytest.approx(4 / 5)
    document = summary.as_json()
    assert document["overlaps"][0]["share"] == first.share
    assert document["mean_overlap"] == pytest.approx((2 / 6 + 4 / 5) / 2)
    assert document["mean_overlap_by_chance"] == pytest.approx((1 / 2 + 4 / 5) / 2)
    console = Console(width=200, file=StringIO())
    console.print(trace_table(summary))
    text = console.file.getvalue()
    assert "33.3%" in text and "in next: 56.7% over all pairs of layers, 65.0% by chance" in text


def test_even_choices_overlap_by_chance_as_often_as_k_of_all():
    rows = np.array([[(n + j) % 4 for j in range(2)] for n in range(4)], np.int16)
    weights = np.ones((4, 2), np.float32)
    layers = {0: LayerRouting(4, rows, weights), 1: LayerRouting(4, rows, weights)}
    trace = RoutingTrace("x", "y", np.arange(4, dtype=np.int32), np.array([0]), layers)
    (overlap,) = summarise(trace).overlaps
    assert (overlap.share, overlap.by_chance) == (1, 0.5)


def test_a_trace_of_one_layer_has_no_overlap():
    layers = {0: LayerRouting(2, np.zeros((3, 1), np.int16), np.ones((3, 1), np.float32))}
    summary = summarise(RoutingTrace("x", "y", np.arange(3), np.array([0]), layers))
    assert summary.overlaps == () and summary.mean_overlap is None
    assert summary.as_json()["mean_overlap"] is None
