"""`verify` and its command, on real conversions."""

import json

import numpy as np
import pytest
import torch

from ane_moe.cli import main
from ane_moe.errors import UserError
from ane_moe.formats.recipe import INT8
from ane_moe.loop.experts import ExpertDispatch
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from ane_moe.manifest import read_manifest
from ane_moe.report.verify_table import verify_report
from ane_moe.verification import proof as verification
from ane_moe.verification.stage import stages
from ane_moe.verification.verify import verify
from ane_moe.verification.whole_model import model_passes
from tests.models import make_model, save_checkpoint
from tests.verification.test_integrity import BLOB, flip_byte
from tests.verification.tiny import tiny_checkpoint, tiny_conversion

# The document that other programs may rely on.
FIELDS = {
    "shards": {
        "path",
        "kind",
        "layer",
        "function",
        "cosine",
        "relative_l2",
        "max_abs_error",
        "passed",
    },
    "routing": {"layer", "set_agreement", "mass_outside_top_k"},
}
MODEL_FIELDS = {
    "top1_agreement",
    "mean_kl",
    "perplexity_golden",
    "perplexity_shards",
    "logit_cosine",
}


def command(capsys, *arguments):
    """Exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as ended:
        main(["verify", *map(str, arguments)])
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err


@pytest.fixture(scope="module")
def report(conversion):
    return verify(conversion)


def test_a_right_conversion_passes_with_every_function_covered(report, conversion):
    assert report.passed and report.failures == 0 and not report.integrity
    covered = {(row.kind, row.function) for row in report.shards}
    assert covered == {("embed", "lookup")} | {
        (kind, function)
        for kind in ("attn", "moe", "dense", "lm_head")
        for function in ("decode", "prefill")
    }
    manifest = json.loads((conversion / "runtime_meta.json").read_text())
    assert {row.path for row in report.shards} == {
        shard["path"] for shard in manifest["shards"]
    } | {"embed.bin"}


def test_prefill_sees_every_token_and_decode_a_part_of_them(report):
    for row in report.shards:
        assert row.tokens == report.golden_tokens > 64 or (
            row.function == "decode" and 4 < row.tokens <= 32
        )


def test_decode_can_be_asked_to_see_every_token(conversion):
    rows = (*(found := verify(conversion, decode_tokens=None)).shards, *found.models)
    assert found.passed and {row.tokens for row in rows} == {found.golden_tokens}


def test_routing_of_masked_shards_agrees(report):
    (routing,) = report.routing
    assert routing.layer == 0 and routing.set_agreement > 0.98
    assert routing.gate_mass_outside_top_k < 0.01 < routing.mass_outside_top_k


def test_perplexity_of_the_golden_is_the_models_own_loss(report, checkpoint, conversion):
    from transformers import AutoModelForCausalLM

    from ane_moe.original.golden import read_golden

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    losses, count = 0.0, 0
    for ids in read_golden(conversion / "golden.safetensors").prompts:
        if len(ids) > 1:
            with torch.no_grad():
                losses += float(model(torch.tensor([ids]), labels=torch.tensor([ids])).loss) * (
                    len(ids) - 1
                )
            count += len(ids) - 1
    prefill = next(model for model in report.models if model.function == "prefill")
    assert prefill.perplexity_golden == pytest.approx(np.exp(losses / count), rel=1e-4)
    assert prefill.perplexity_shards == pytest.approx(prefill.perplexity_golden, rel=1e-2)
    assert prefill.mean_kl < 1e-3 and prefill.logit_cosine > 0.9999


def test_an_explicit_state_in_the_other_layout_passes_too(checkpoint, tmp_path):
    out = tiny_conversion(checkpoint, tmp_path / "out", state="explicit", layout="bct1")
    found = verify(out, checkpoint=checkpoint)
    assert found.passed and [model.function for model in found.models] == ["decode"]
    assert found.models[0].tokens == found.golden_tokens


def test_a_layer_in_parts_is_judged_by_their_sum(tmp_path):
    checkpoint = save_checkpoint(
        make_model(
            "mixtral",
            num_hidden_layers=1,
            num_local_experts=4,
            hidden_size=256,
            intermediate_size=512,
        ),
        tmp_path / "checkpoint",
    )
    out = tiny_conversion(checkpoint, tmp_path / "out", max_shard_mb=1)
    rows = [row for row in verify(out, checkpoint=checkpoint).shards if row.kind == "moe"]
    assert len(rows) > 1 and all(row.passed for row in rows)
    assert len({(row.cosine, row.max_abs_error) for row in rows}) == 1


def test_soft_routing_fails_and_says_what_it_costs(checkpoint, tmp_path):
    found = verify(
        tiny_conversion(checkpoint, tmp_path / "out", routing="soft"), checkpoint=checkpoint
    )
    assert not found.passed and {row.kind for row in found.shards if not row.passed} == {"moe"}
    (routing,) = found.routing
    assert routing.set_agreement == 0
    assert routing.gate_mass_outside_top_k == pytest.approx(routing.mass_outside_top_k, abs=0.01)


def test_a_subset_of_layers_is_checked_without_the_whole_model(checkpoint, tmp_path):
    found = verify(
        tiny_conversion(checkpoint, tmp_path / "out", layers=(0,)), checkpoint=checkpoint
    )
    assert found.passed and not found.models and "1 of 2 layers" in found.model_skipped
    assert {row.kind for row in found.shards} == {"embed", "attn", "moe"}
    assert found.as_json()["model"] is None


def test_thresholds_can_be_changed(conversion):
    strict = verify(conversion, min_cosine=0.99999999)
    assert not strict.passed and any(
        "cosine" in row.reason for row in strict.shards if not row.passed
    )
    assert not verify(conversion, min_logit_cosine=1.1).passed


def test_json_holds_what_was_promised(conversion, capsys):
    code, out, _ = command(capsys, conversion, "--json")
    document = json.loads(out)
    assert code == 0 and document["passed"] is True and document["runtime"] == "reference"
    for part, fields in FIELDS.items():
        assert document[part] and all(fields <= row.keys() for row in document[part])
    assert document["model"].keys() >= MODEL_FIELDS
    assert document["model_by_function"].keys() == {"decode", "prefill"}


def test_the_table_names_the_verdict_and_the_margins(conversion, capsys):
    code, out, _ = command(capsys, conversion)
    assert code == 0 and "passed" in out and "margin" in out


def test_a_failed_gate_exits_with_1_and_names_the_shard(conversion, capsys):
    code, out, _ = command(capsys, conversion, "--min-cosine", "0.99999999")
    assert code == 1 and "FAILED" in out and "moe/layer_00.mlpackage" in out


def test_damaged_files_exit_with_1_and_nothing_is_run(copy, capsys):
    folder = copy()
    flip_byte(folder / BLOB)
    code, out, _ = command(capsys, folder, "--json")
    document = json.loads(out)
    assert code == 1 and document["passed"] is False
    assert [problem["path"] for problem in document["integrity"]] == [BLOB]
    assert document["shards"] == [] and document["model"] is None
    code, out, _ = command(capsys, folder)
    text = " ".join(out.split())  # lines break where the width of the terminal says
    assert code == 1 and "weight.bin" in text and "nothing was run" in text


def test_without_a_golden_or_a_checkpoint_the_error_says_what_to_do(checkpoint, tmp_path, capsys):
    out = tiny_conversion(checkpoint, tmp_path / "out")
    code, stdout, error = command(capsys, out)
    assert code == 2 and stdout == "" and "--checkpoint" in error and "--golden" in error


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[[1, 61]]", "61"),
        ("[[-1]]", "-1"),
        ("[[]]", "0 tokens"),
        ("[[1.5]]", "1.5"),
        ("[]", "no prompts"),
        ("[", "cannot be read"),
        ('["text"]', "no tokenizer"),
        (str([[1] * 129]), "129 tokens"),
    ],
)
def test_bad_prompts_are_one_line_and_exit_2(text, found, conversion, checkpoint, tmp_path, capsys):
    path = tmp_path / "prompts.json"
    path.write_text(text)
    code, stdout, error = command(capsys, conversion, "--checkpoint", checkpoint, "--prompts", path)
    assert (code, stdout) == (2, "") and found in error.splitlines()[-1]


def test_a_golden_of_another_model_is_refused(conversion, tmp_path):
    other = tiny_checkpoint("qwen3_moe", tmp_path / "other", vocab_size=62, num_hidden_layers=2)
    with pytest.raises(UserError, match="62 for 61"):
        verify(conversion, checkpoint=other)


def test_a_folder_that_is_no_conversion_is_refused(tmp_path, capsys):
    code, _, error = command(capsys, tmp_path)
    assert code == 2 and "not a finished conversion" in error


def test_an_unknown_runtime_is_refused(conversion):
    with pytest.raises(UserError, match="Unknown runtime"):
        verify(conversion, runtime="gpu")


def test_a_report_without_numbers_can_still_be_drawn(copy):
    folder = copy()
    flip_byte(folder / "embed.bin")
    assert verify_report(verify(folder))


def test_each_package_is_opened_once_for_two_goldens_and_the_whole_model(tmp_path, monkeypatch):
    checkpoint = tiny_checkpoint("mixtral", tmp_path / "checkpoint")
    out = tiny_conversion(checkpoint, tmp_path / "out", recipe=INT8, prefill=16, golden=True)
    opened, open_package = [], verification.open_package

    def counted(path, *arguments, **options):
        opened.append(path)
        return open_package(path, *arguments, **options)

    monkeypatch.setattr(verification, "open_package", counted)
    report = verify(out)
    assert report.passed and report.models and report.as_stored.models
    assert sorted(opened) == sorted(out / shard.path for shard in read_manifest(out).shards)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"state": "explicit", "layout": "bct1"},
        {"routing": "sparse", "expert_tokens": (1, 4)},
        {"layers_per_shard": 2},
        {"max_shard_mb": 0.02},
        {"prefill": 0},
    ],
    ids=str,
)
def test_stage_by_stage_gives_the_logits_of_the_token_loop_to_the_bit(
    options, checkpoint, tmp_path
):
    out = tiny_conversion(checkpoint, tmp_path / "out", **{"prefill": 16, **options})
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(3, 61, length).tolist()) for length in (37, 9)]
    shards = load_shards(out, "reference")
    dispatch = ExpertDispatch(shards.experts, shards.cache) if shards.cache else None
    streams = [shards.embed[np.asarray(ids)] for ids in prompts]
    tail = 5 if shards.manifest.prefill else None
    passes = model_passes(shards.manifest, prompts, streams, tail)
    by_path = {one.shard.path: one for one in shards.loaded}
    for stage in stages(shards.manifest):
        steps = [
            shards.experts[step] if isinstance(step, int) else by_path[step.path] for step in stage
        ]
        for model_pass in passes:
            model_pass.advance(steps, shards.ropes, dispatch)
    for model_pass in passes:
        for prompt in model_pass.prompts:
            session = Session(shards)
            if prompt.cut:
                session.prefill(prompt.ids[: prompt.cut])
            expected = session.prefill_logits(prompt.ids[prompt.cut :], by=model_pass.function)
            assert np.array_equal(prompt.logits, expected)
    assert [one.function for one in passes] == (
        ["decode", "prefill"] if shards.manifest.prefill else ["decode"]
    )


def test_report_prints_what_verify_prints_and_fails_as_it_does(copy, capsys):
    folder = copy()
    _, verified, _ = command(capsys, folder)
    verified, _, following = verified.rpartition("next: ")
    assert following == f"ane-moe report {folder}\n"
    for passes in (True, False):
        if not passes:
            flip_byte(folder / "embed.bin")
        with pytest.raises(SystemExit) as ended:
            main(["report", str(folder)])
        printed = capsys.readouterr().out
        assert (ended.value.code or 0) == (0 if passes else 1)
        assert f"report: {folder / 'report.html'}" in printed
        assert verified in printed if passes else "FAILED" in printed and "embed.bin" in printed
