"""Parallel tracks as shards: what the loop makes of them is the reference model's, whatever runs
beside whatever."""

import math
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from ane_moe.benchmark.measurement import BenchOptions, bench
from ane_moe.checkpoints.checkpoint import open_checkpoint
from ane_moe.conversion.pipeline import convert
from ane_moe.conversion.plan import ConvertOptions, sources_of
from ane_moe.conversion.planner import make_plan
from ane_moe.errors import UserError
from ane_moe.families import describe, describe_config
from ane_moe.families.pt_moe import published
from ane_moe.forecast.chips import find_chip
from ane_moe.forecast.layer_kinds import plan_kinds
from ane_moe.forecast.outlook import outlook
from ane_moe.forecast.track_forms import advice, track_forms
from ane_moe.forecast.workload import workload_of_plan
from ane_moe.formats.recipe import FP16, find_recipe
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from ane_moe.model.spec import ModelSpec, Synchronisations, TrackSpec
from ane_moe.report.bench_table import bench_report
from ane_moe.report.markdown import render_markdown
from ane_moe.report.outlook_table import print_outlook
from ane_moe.report.report_data import gather
from ane_moe.verification.verify import verify
from tests.models import make_model, read_config, save_checkpoint
from tests.slow_set import slow_but
from tests.zoo import SLIDING

IDS = np.random.default_rng(1).integers(3, 211, 37).tolist()
OPTIONS = ConvertOptions(context=64, prefill=16, recipe=FP16)
CLOSE = 2e-2


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def prepared(folder: Path, reduce: str, golden: bool = False, fields=None, **changes):
    """The model, its checkpoint and its conversion."""
    model = make_model("pt_moe", track_reduce=reduce, **(fields or {}))
    save_checkpoint(model, folder / "checkpoint")
    options = replace(OPTIONS, **changes)
    convert(folder / "checkpoint", folder / "out", options, golden=golden)
    return model, folder / "checkpoint", folder / "out"


@pytest.fixture(scope="module")
def mean(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("mean"), "mean", golden=True)


def spec_of(folder: Path) -> ModelSpec:
    return describe(open_checkpoint(folder))[0]


def logits(out: Path, concurrency: int = 1, ids=IDS) -> tuple[np.ndarray, Session]:
    """Of the last token of a prefill, and of one decoded after it."""
    session = Session(load_shards(out, "reference"), concurrency=concurrency)
    return np.stack([session.prefill(ids[:-1]).copy(), session.decode(ids[-1])]), session


@torch.no_grad()
def expected(model, ids=IDS) -> np.ndarray:
    return model(torch.tensor([ids])).logits[0, -2:].numpy()


def test_a_conversion_is_proved_and_a_wrong_track_is_found(mean, tmp_path):
    out = mean[2]
    report = verify(out, runtime="reference", decode_tokens=4)
    assert report.passed and {row.function for row in report.models} == {"decode", "prefill"}
    wrong = make_model("pt_moe")
    wrong.model.layers[6].mlp.down_proj.weight.data.mul_(1.2)  # in the second track of block 0
    save_checkpoint(wrong, tmp_path / "other")
    found = verify(out, checkpoint=tmp_path / "other", runtime="reference", decode_tokens=4)
    failed = {row.path for row in found.shards if not row.passed}
    assert failed == {"tracks/block_00_track_1.mlpackage"}


@pytest.mark.parametrize("concurrency", [1, 2, 4])
def test_the_loop_computes_the_model_with_the_same_bits_by_any_threads(mean, concurrency):
    found, session = logits(mean[2], concurrency)
    assert np.abs(found - expected(mean[0])).max() < CLOSE
    assert found.tobytes() == logits(mean[2])[0].tobytes()
    # Six layers, four to a block.
    assert session.figures.decode.synchronisations == 2
    assert session.figures.prefill.synchronisations == 3 * 2


def test_permuted_tracks_give_the_same_bits(mean, tmp_path):
    model, _, out = mean
    permuted = make_model("pt_moe")
    blocks = model.model.blocks
    for numbers, others in ((block[i], block[1 - i]) for block in blocks for i in (0, 1)):
        for mine, theirs in zip(numbers, others, strict=True):
            permuted.model.layers[mine].load_state_dict(model.model.layers[theirs].state_dict())
    save_checkpoint(permuted, tmp_path / "checkpoint")
    convert(tmp_path / "checkpoint", tmp_path / "out", OPTIONS)
    assert logits(tmp_path / "out")[0].tobytes() == logits(out)[0].tobytes()


def test_tokens_that_all_choose_alike_lose_none(mean):
    ids = [7] * 30
    found, session = logits(mean[2], ids=ids)
    assert np.abs(found - expected(mean[0], ids)).max() < CLOSE
    assert len(np.flatnonzero(session.slot("gates.1").any(1))) == 2  # of six experts


SPARSE = {"routing": "sparse", "expert_tokens": (1, 16)}


@pytest.mark.parametrize(
    ("reduce", "kinds"),
    [
        ("mean", ["dense", "sparse"]),
        pytest.param("sum", ["sparse", "dense"], marks=pytest.mark.slow),
    ],
)
def test_dispatched_experts_of_a_track_add_to_its_stream(reduce, kinds, tmp_path):
    """The last of a block's are of its meeting, where the last layer has experts."""
    fields = {"mlp_layer_types": kinds * 3}
    model, _, out = prepared(tmp_path, reduce, golden=True, fields=fields, **SPARSE)
    shards = load_shards(out, "reference")
    own, meet = [f"stream.track_{track}" for track in (0, 1)], ["stream"] * 2
    # Of the first block two layers of each track have experts, of the second one.
    assert [step.target for step in shards.experts.values()] == (
        [own[0], "stream", own[1], "stream", *meet]
        if kinds[-1] == "sparse"
        else [own[0], own[0], own[1], own[1], *own]
    )
    found, session = logits(out)
    assert np.abs(found - expected(model)).max() < CLOSE
    assert session.figures.decode.synchronisations == 2
    for concurrency in (2, 4):
        assert found.tobytes() == logits(out, concurrency)[0].tobytes()
    report = verify(out, runtime="reference", decode_tokens=4)
    assert report.passed and {"experts", "dispatch"} < {row.kind for row in report.shards}


def test_dispatched_experts_of_a_track_drop_no_token(tmp_path):
    model, _, out = prepared(tmp_path, "mean", **SPARSE)
    for ids in ([7] * 37, IDS):
        found, session = logits(out, ids=ids)
        assert np.abs(found - expected(model, ids)).max() < CLOSE
        for layer in load_shards(out, "reference").experts:
            gates = session.slot(f"gates.{layer}")
            assert ((gates != 0).sum(0) == 2).all()
            assert gates.sum(0) == pytest.approx(1, abs=2e-3)


def test_stored_experts_of_a_track_give_the_same_bits(mean, tmp_path):
    rows = {}
    for routing in ("sparse", "stream"):
        options = replace(OPTIONS, routing=routing, expert_tokens=(1, 16))
        convert(mean[1], tmp_path / routing, options)
        rows[routing] = logits(tmp_path / routing)[0].tobytes()
    assert rows["stream"] == rows["sparse"] == logits(tmp_path / "stream", 2)[0].tobytes()


def test_blocks_above_the_size_limit_are_cut(tmp_path):
    """Each expert alone, and `sum`."""
    model, _, out = prepared(tmp_path, "sum", golden=True, max_shard_mb=0, prefill=0)
    slots = {
        (port.slot, port.how)
        for shard in load_shards(out, "reference").manifest.shards
        for port in shard.functions[0].ports.outputs
        if port.root == "stream"
    }
    assert slots == {
        *(("stream.track_0", how) for how in ("set", "add")),
        *(("stream.track_1", how) for how in ("set", "add")),
        *(("stream", how) for how in ("set", "add", "sum")),
    }
    found, session = logits(out)
    assert np.abs(found - expected(model)).max() < CLOSE
    assert found.tobytes() == logits(out, 3)[0].tobytes()
    assert session.figures.decode.synchronisations == 2
    assert verify(out, runtime="reference", decode_tokens=4).passed


def test_one_track_is_planned_as_layers_that_share_a_shard(tmp_path):
    model = make_model("pt_moe", num_tracks=1, layer_types=[SLIDING] * 6)
    spec = spec_of(save_checkpoint(model, tmp_path))
    tracked = make_plan(spec, sources_of(spec), OPTIONS).shards
    plain = replace(spec, tracks=None)
    options = replace(OPTIONS, layers_per_shard=4, ring_caches=True)
    stacked = make_plan(plain, sources_of(plain), options).shards
    for one, other in zip(tracked, stacked, strict=True):
        assert (one.functions, one.graphs, one.sources) == (
            other.functions,
            other.graphs,
            other.sources,
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (0, 1)}, "whole blocks"),
        ({"routing": "sparse", "tracks": "packed"}, "between layers of a track"),
    ],
)
def test_what_is_not_possible_is_said(mean, options, message):
    spec = spec_of(mean[1])
    with pytest.raises(UserError, match=message):
        make_plan(spec, sources_of(spec), replace(OPTIONS, **options))


@pytest.mark.parametrize(
    "changes",
    [
        {"track_reduce": "max"},
        {"num_tracks": 3},
        {"track_depth": 0},
        {"mlp_layer_types": ["dense"]},
    ],
)
def test_a_senseless_configuration_is_refused(mean, changes):
    config = read_config(mean[1])
    with pytest.raises(UserError, match=next(iter(changes)).replace("num_tracks", "num_")):
        describe_config(config | changes)


def test_synchronisations_are_planned_as_they_are_counted(mean):
    """L / D against 2 L, where blocks are whole; half a block meets too."""
    for depth, share in ((1, 0.5), (2, 0.75), (4, 0.875), (8, 0.9375)):
        found = TrackSpec(8, depth, "mean").synchronisations(8 * 32)
        assert (found.each_step, found.tensor_parallel) == (32 // depth, 64)
        assert found.saved == share == 1 - 1 / (2 * depth)
    manifest = load_shards(mean[2], "reference").manifest
    planned = manifest.synchronisations
    assert (planned.tracks, planned.each_step, planned.tensor_parallel) == (2, 2, 12)
    report = bench(
        mean[2], BenchOptions(runs=1, tokens=2, warmup=1, fills=(4,)), runtime="reference"
    )
    assert [row.synchronisations_per_token for row in report.decode] == [planned.each_step]
    assert planned.sentence in markdown_of(mean[2])
    text = Console(width=200, file=StringIO())
    text.print(bench_report(report))
    assert f"{planned.sentence}; counted decoding: 2" in text.file.getvalue()


def markdown_of(out: Path) -> str:
    return render_markdown(gather(out))


# Layers, heads, KV heads and weights (1e9): arXiv 2602.07306.
PUBLISHED = {"pt-6b": (32, 32, 8, 6), "pt-13b": (40, 40, 8, 13), "pt-30b": (48, 64, 8, 30)}


@pytest.mark.parametrize(("name", "shape"), PUBLISHED.items())
def test_plans_of_the_published_shapes(name, shape, capsys):
    layers, heads, kv_heads, billions = shape
    for depth in (2, 4, 8):
        spec = describe_config(published(f"{name}-d{depth}"))
        assert len(spec.layers) == 8 * layers
        mixers = [layer.mixer for layer in spec.layers[:4]]
        assert {(8 * m.heads, 8 * m.kv_heads) for m in mixers} == {(heads, kv_heads)}
        # With two layers to a block the second track begins after the first's two.
        assert [m.window for m in mixers] == [4096] * 3 + [4096 if depth == 2 else None]
        weights = sum(math.prod(row.shape) for _, row in spec.weights())
        assert weights / 1e9 == pytest.approx(billions, rel=0.02)
        planned = spec.tracks.synchronisations(len(spec.layers))
        assert planned == Synchronisations(8, layers // depth, 2 * layers)
    found = outlook(f"{name}-d4", recipes=("int8",))
    assert found.supported and [choice.routing for choice in found.choices] == ["masked"]
    print_outlook(found)
    assert "8 tracks meet" in capsys.readouterr().out


def test_a_forecast_of_one_block_of_each_kind_is_that_of_all(mean):
    spec = spec_of(mean[1])
    more = replace(spec, layers=(*spec.layers[:8], *spec.layers))  # one more whole block
    options = replace(OPTIONS, max_shard_mb=220)
    kinds, whole = plan_kinds(more, options), make_plan(more, sources_of(more), options)
    assert len(kinds.plan.layers) == 12 and len(whole.layers) == 20
    assert workload_of_plan(kinds.plan, kinds.repeats) == workload_of_plan(whole)


@pytest.mark.parametrize("reduce", slow_but(["mean"], ["mean", "sum"]))
def test_tracks_in_one_graph_are_the_same_model_by_fewer_calls(reduce, tmp_path):
    model, _, out = prepared(tmp_path, reduce, golden=True, tracks="packed", state="explicit")
    manifest = load_shards(out, "reference").manifest
    packed = [shard for shard in manifest.shards if shard.kind == "track"]
    assert [shard.layers for shard in packed] == [tuple(range(8)), (8, 9, 10, 11)]
    assert manifest.synchronisations is None  # of the host
    found, session = logits(out)
    assert np.abs(found - expected(model)).max() < CLOSE
    assert session.figures.decode.synchronisations == 0
    report = verify(out, runtime="reference", decode_tokens=4)
    assert report.passed and len({row.path for row in report.shards if row.kind == "track"}) == 2
    assert {row.layer for row in report.routing} == {1, 3, 5, 7, 9, 11}


@pytest.mark.parametrize(("chip", "better"), [("m4-max", "packed"), ("m6", "apart")])
def test_the_forecast_says_which_form_is_better(chip, better):
    """One engine likes fewer calls, two engines two programs."""
    spec = describe_config(published("pt-6b-d8"))
    forms = track_forms(spec, ConvertOptions(recipe=find_recipe("int8")), find_chip(chip))
    assert [form.tracks for form in forms] == sorted(
        ("apart", "packed"), key=lambda form: form != better
    )
    assert f"--tracks {better}" in advice(forms, chip)
    # Four blocks, each of eight tracks.
    calls = {form.tracks: form.calls_per_token for form in forms}
    assert calls["apart"] - calls["packed"] == 4 * 7
