"""Timing a conversion whose output is right, and refusing to time one whose output is wrong."""

import json
import shutil
from io import StringIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.numpy import load_file, safe_open, save_file
from typer.testing import CliRunner

from ane_moe import bench
from ane_moe.benchmark.loop_timing import default_fills, default_lengths, time_decode, time_prefill
from ane_moe.benchmark.measurement import BenchOptions
from ane_moe.benchmark.output_check import CLEAR, _wrong_tokens
from ane_moe.benchmark.result import latency
from ane_moe.cli import app
from ane_moe.errors import UserError
from ane_moe.forecast.chips import find_chip
from ane_moe.forecast.cost_model import predict
from ane_moe.forecast.workload import workload_of
from ane_moe.formats.recipe import INT8
from ane_moe.loop.session import Session
from ane_moe.manifest import read_manifest
from ane_moe.progress import silent
from ane_moe.report.bench_table import bench_report
from ane_moe.runtime.coreml.modelc_cache import ModelCache
from ane_moe.verification.metrics import relative_l2_limit
from ane_moe.verification.model_metrics import PromptLogits
from tests.runtime.numpy_shards import EXPERTS, Decoder, make_manifest, make_shards
from tests.standin.fixtures import standin as standin
from tests.verification.tiny import tiny_conversion

QUICK = ("--runs", "2", "--warmup", "1", "--tokens", "3", "--fills", "0,40", "--lengths", "16,40")


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], terminal_width=200)


@pytest.fixture(scope="module")
def document(small):
    result = run(small, *QUICK, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


# -- figures
# --------------------------------------------------------------------------------------------------


def test_no_figure_of_the_reference_runtime_can_be_taken_for_a_devices(small, document):
    assert document["device_figures"] is False and document["runtime"] == "reference"
    assert "not a Neural Engine speed" in document["conditions"]["label"]
    text = run(small, *QUICK).stdout
    titles = [
        line for line in text.splitlines() if line.startswith(("Functions", "Decode", "Prefill"))
    ]
    assert len(titles) == 3 and all("NOT A DEVICE" in title for title in titles)


def test_every_kind_of_function_is_timed_with_its_load_and_first_call(small, document):
    manifest = read_manifest(small)
    wanted = {
        (shard.kind, function.name, function.tokens)
        for shard in manifest.shards
        for function in shard.functions
    }
    assert {
        (row["kind"], row["function"], row["tokens"]) for row in document["functions"]
    } == wanted
    for row in document["functions"]:
        assert row["load_seconds"] > 0 and row["first_call_ms"] > 0
        assert (
            0 < row["latency"]["min_ms"] <= row["latency"]["median_ms"] <= row["latency"]["p95_ms"]
        )
        assert row["latency"]["runs"] == 2


def test_the_parts_of_a_token_add_up_to_the_whole_and_calls_are_those_of_the_manifest(
    small, document
):
    shards = len(read_manifest(small).shards)
    assert [row["fill"] for row in document["decode"]] == [0, 40]
    for row in document["decode"] + document["prefill"]:
        parts = sum(row["kinds_ms"].values()) + row["load_ms"] + row["host_ms"]
        assert parts == pytest.approx(1000 / row["tok_s"], rel=1e-6)
        outside = row["load_ms"] + row["host_ms"]
        assert row["gap_ms"] == pytest.approx(outside / row["calls_per_token"])
    assert all(row["calls_per_token"] == shards for row in document["decode"])
    short, long = document[
        "prefill"
    ]  # calls of 16 tokens; only the last one is followed by the head's two
    assert short["calls_per_token"] == pytest.approx((shards - 2 + 2) / 16)
    assert long["calls_per_token"] == pytest.approx((3 * (shards - 2) + 2) / 40)


def test_conditions_say_what_was_measured_where(small, document):
    conditions = document["conditions"]
    assert {
        "chip",
        "os",
        "versions",
        "power_source",
        "thermal",
        "warmup",
        "prefill_tokens",
    } <= conditions.keys()
    assert (conditions["prefill_tokens"], conditions["warmup"], conditions["units"]) == (
        16,
        1,
        None,
    )
    assert conditions["versions"].keys() >= {"python", "coremltools", "torch", "ane-moe"}
    manifest = read_manifest(small)
    memory = document["memory"]
    assert memory["weight_bytes"] == sum(shard.weight_bytes for shard in manifest.shards)
    assert (
        memory["kv_cache_bytes"] == 2 * 2 * 16 * manifest.cache_width
    )  # K and V, fp16, one head of 16
    assert memory["peak_bytes"] >= memory["process_bytes"] > 0


@given(seconds=st.lists(st.floats(1e-6, 10), min_size=1, max_size=60))
def test_latency_equals_numpys_statistics(seconds):
    found = latency(seconds)
    assert found.median_ms == pytest.approx(1000 * np.median(seconds))
    assert found.p95_ms == pytest.approx(1000 * np.percentile(seconds, 95, method="inverted_cdf"))
    assert (found.min_ms, found.runs) == (pytest.approx(1000 * min(seconds)), len(seconds))


def test_expert_calls_and_cache_figures_are_of_the_row_alone():
    decoder = Decoder((None, None), k=2)
    session = Session(make_shards(decoder, make_manifest((None, None), routing="sparse")))
    rows = list(time_decode(session, [1, 2, 3], [0, 5], 4, 2, silent))
    for row in rows:
        assert row.calls_per_token == 2 + 2 * 2 + len(
            session.shards.head
        )  # attention, k experts a layer, head
        assert row.cache.hits + row.cache.late + row.cache.misses == 4 * 2 * 2
    assert sum(row.cache.bytes_loaded for row in rows) < session.figures.cache.bytes_loaded + 1
    (few,) = time_prefill(session, [1, 2, 3], [9], 2, silent)
    assert few.cache.hits <= 2 * 2 * EXPERTS * 2 and few.tokens == 9


@pytest.mark.parametrize(("prefill", "context"), [(8, 40), (0, 40), (64, 40)])
def test_defaults_fit_the_context(prefill, context):
    manifest = make_manifest((None,), prefill=prefill, context=context)
    session = Session(make_shards(Decoder((None,)), manifest))
    fills, lengths = default_fills(manifest, 4, 1), default_lengths(manifest)
    assert [row.fill for row in time_decode(session, [1], fills, 4, 1, silent)] == list(fills)
    assert [row.tokens for row in time_prefill(session, [1], lengths, 1, silent)] == list(lengths)
    assert fills[-1] == context - 5


def test_a_fill_that_leaves_no_room_is_refused(small):
    result = run(small, "--fills", "4000")
    assert isinstance(result.exception, UserError) and "context" in str(result.exception)


# -- no speed for wrong output
# ------------------------------------------------------------------------------------


def edit_golden(folder, edit, name="golden.safetensors"):
    path = folder / name
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata)


def test_wrong_output_has_no_speed_and_exits_with_1(small_copy, tmp_path):
    def shuffle(tensors):
        tensors["logits"] = np.ascontiguousarray(tensors["logits"][:, ::-1])

    edit_golden(small_copy, shuffle)
    saved = tmp_path / "saved.json"
    result = run(small_copy, *QUICK, "--json", "--save", saved)
    found = json.loads(result.stdout)
    assert result.exit_code == 1 and not found["passed"] and not saved.exists()
    assert (
        not found["functions"]
        and not found["decode"]
        and not found["prefill"]
        and found["load"] is None
    )
    assert not any(word in run(small_copy, *QUICK).stdout for word in ("tok/s", "median"))


def test_one_clearly_wrong_greedy_token_fails_where_the_mean_cosine_does_not(small_copy):
    def one_token(tensors):
        row = tensors["logits"][-1]
        row[row.argmin()] = row.max() + 20 * row.std()

    edit_golden(small_copy, one_token)
    report = bench(small_copy, BenchOptions(runs=1), min_logit_cosine=0.9)
    assert all(check.model.passed for check in report.checks)
    assert [check.wrong_tokens for check in report.checks] == [1, 1] and not report.passed


def test_compression_excuses_no_wrong_shard(small_checkpoint, tmp_path):
    out = tiny_conversion(small_checkpoint, tmp_path / "out", prefill=16, golden=True, recipe=INT8)
    options = BenchOptions(runs=1, tokens=1, fills=(0,), lengths=(16,))
    report = bench(out, options)
    assert report.passed
    assert [(check.golden, check.model.function) for check in report.checks] == [
        ("original", "decode"),
        ("as stored", "decode"),
        ("original", "prefill"),
        ("as stored", "prefill"),
    ]
    found = {check.golden: check.model for check in report.checks}
    assert found["as stored"].logit_cosine > found["original"].logit_cosine
    assert (found["original"].min_logit_cosine, found["as stored"].min_logit_cosine) == (0.9, 0.99)

    def disturb(tensors):  # an error that the gate for compressed weights would let through
        noise = np.random.default_rng(0).standard_normal(tensors["logits"].shape).astype(np.float32)
        tensors["logits"] += 0.25 * noise * tensors["logits"].std()

    edit_golden(out, disturb, "golden_as_stored.safetensors")
    report = bench(out, options)
    assert not report.passed and report.load is None
    assert [check.passed for check in report.checks] == [True, False, True, False]
    edit_golden(
        out,
        lambda tensors: tensors.update(prompt_ids=tensors["prompt_ids"][::-1].copy()),
        "golden_as_stored.safetensors",
    )
    with pytest.raises(UserError, match="same prompts"):
        bench(out, options)


def test_a_token_is_clearly_wrong_just_beyond_what_the_gate_allows():
    limit = CLEAR * relative_l2_limit(0.99)
    golden = np.tile(np.random.default_rng(0).standard_normal(1000).astype(np.float32), (2, 1))
    own = golden[0].argmax()
    other = int(np.argsort(golden[0])[-2])
    golden[1, own] = golden[1, other] + 3 * limit  # row 0: a near tie, row 1: far apart
    shards = golden.copy()
    shards[:, other] += 10
    one = PromptLogits(0, 0, (1, 2), golden, shards)
    assert golden[0, own] - golden[0, other] < limit * golden[0].std()
    assert _wrong_tokens(one, 0.99) == 1


def test_without_a_golden_it_says_how_to_get_one(small_copy):
    meta = small_copy / "runtime_meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"golden": None}))
    with pytest.raises(UserError, match="--golden"):
        bench(small_copy)


# -- Core ML
# --------------------------------------------------------------------------------------------------


def test_core_ml_gets_the_units_and_its_figures_are_a_devices(small, tmp_path, standin):
    cache = ModelCache(tmp_path / "cache")
    options = BenchOptions(runs=1, warmup=0, tokens=1, fills=(0,), lengths=(16,), units="cpu_only")
    first = bench(small, options, runtime="coreml", cache=cache, trial=False)
    again = bench(small, options, runtime="coreml", cache=cache, trial=False)
    assert first.passed and first.is_device and first.as_json()["device_figures"]
    assert first.conditions.units == "cpu_only"
    count = len(read_manifest(small).shards)
    assert first.conditions.compiled_before == (0, count)
    assert again.conditions.compiled_before == (count, count)


@pytest.mark.parametrize(
    ("brand", "units", "why"),
    [
        ("Apple M4 Max", "cpu_and_ne", None),
        ("Apple M99", "cpu_and_ne", "m99"),
        ("Apple M4 Max", "cpu_only", "units"),
    ],
)
def test_the_prediction_stands_beside_what_was_measured(
    small, tmp_path, standin, brand, units, why
):
    tool = standin.folder / "bin" / "sysctl"
    tool.write_text(f"#!/bin/sh\necho '{brand}'\n")
    tool.chmod(0o755)
    options = BenchOptions(runs=1, warmup=0, tokens=2, fills=(0,), lengths=(16, 20), units=units)
    cache = ModelCache(tmp_path / "cache")
    cold = bench(small, options, runtime="coreml", cache=cache, trial=False)
    if why:
        assert cold.predicted is None and why in cold.predicted_skipped
        return
    warm = bench(small, options, runtime="coreml", cache=cache, trial=False)
    expected = predict(workload_of(small), find_chip("m4-max"), loop="naive")
    whats = ["decode after 0 tokens", "prefill of 16 tokens"]  # 20 tokens are no whole calls of 16
    assert [row["what"] for row in cold.predicted["rows"]] == whats  # loading included compilation
    assert [row["what"] for row in warm.predicted["rows"]] == [*whats, "loading"]
    decode, prefill, loading = warm.predicted["rows"]
    assert decode["predicted"] == vars(expected.decode.per_token_ms)
    assert prefill["measured"] == pytest.approx(warm.prefill[0].latency.median_ms / 16)
    assert loading["ratio"] == pytest.approx(warm.load.seconds / expected.load_seconds.expected)
    assert decode["within"] == expected.decode.per_token_ms.contains(decode["measured"])
    text = StringIO()
    Console(file=text, width=160).print(bench_report(warm))
    assert "gap on the host before a call" in text.getvalue() and "0.15 ms" in text.getvalue()
    assert "Predicted for m4-max" in text.getvalue() and "NOT A DEVICE" not in text.getvalue()


def test_the_reference_runtime_is_not_held_against_a_chip(document):
    assert document["predicted"] is None and "reference" in document["predicted_skipped"]


def test_units_mean_nothing_to_the_reference_runtime(small):
    with pytest.raises(UserError, match="compute units"):
        bench(small, BenchOptions(units="all"), runtime="reference")


# -- saved and compared
# -------------------------------------------------------------------------------------------


def test_a_run_against_itself_doubled_shows_the_ratio(small, document, tmp_path):
    saved = tmp_path / "saved.json"
    slow = json.loads(json.dumps(document))
    for row in slow["decode"]:
        row["tok_s"] = 1e-3
    slow["conditions"]["chip"] = "another"
    saved.write_text(json.dumps(slow))
    result = run(small, *QUICK, "--json", "--against", saved)
    against = json.loads(result.stdout)["against"]
    assert against["differing"]["chip"] == ["another", document["conditions"]["chip"]]
    changes = {change["what"]: change for change in against["changes"]}
    assert len(changes) == len(document["functions"]) + 4 + 1
    now = changes["decode after 40 tokens"]
    assert now["ratio"] == pytest.approx(now["now"] / 1e-3) and now["unit"] == "tok/s"
    function = changes["attn decode (T=1)"]
    assert function["ratio"] == pytest.approx(function["before"] / function["now"])


def test_save_writes_what_json_prints_and_reads_back(small, tmp_path):
    saved = tmp_path / "saved.json"
    printed = json.loads(run(small, *QUICK, "--json", "--save", saved).stdout)
    del printed["against"]
    assert json.loads(saved.read_text()) == printed
    assert run(small, *QUICK, "--against", saved).exit_code == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no json", "cannot be read"),
        ("[]", "no saved bench report"),
        ('{"format": 1}', "no saved bench report"),
        ('{"format": 1, "passed": false, "functions": []}', "wrong"),
        (
            '{"format": 1, "passed": true, "functions": [], "runtime": "coreml"}',
            "different runtimes",
        ),
        ('{"format": 1, "passed": true, "functions": [], "runtime": "reference"}', "not a whole"),
    ],
)
def test_a_file_that_is_no_saved_report_is_named(small, tmp_path, text, words):
    (tmp_path / "saved.json").write_text(text)
    result = run(small, *QUICK, "--against", tmp_path / "saved.json")
    assert isinstance(result.exception, UserError) and words in str(result.exception)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--fills", "a"),
        ("--lengths", "0"),
        ("--runs", "0"),
        ("--vs", "mlx"),
        ("--warmup", "-1"),
        ("--energy",),
    ],
)
def test_senseless_options_are_refused_at_once(small, arguments):
    if arguments == ("--energy",) and shutil.which("powermetrics"):
        pytest.skip("this machine has powermetrics")
    assert isinstance(run(small, *arguments).exception, UserError)
