"""Conversions to the Hub and back, through a server of this machine that speaks its routes."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from typer.testing import CliRunner

from ane_moe.cli import app
from ane_moe.errors import UserError
from ane_moe.files import sha256
from ane_moe.hub import pulled as pulling
from ane_moe.hub import pushed as pushing
from ane_moe.hub.digests import check_digests
from ane_moe.hub.pulled import PARTIAL, pull, pulled
from ane_moe.hub.pushed import push
from ane_moe.manifest import FILE_NAME, read_manifest
from ane_moe.report.card import render_card
from ane_moe.report.report_data import gather
from ane_moe.verification.verify import verify
from tests.checkpoints.hub_server import Hub, point_at, served
from tests.verification.tiny import tiny_checkpoint, tiny_conversion

NAME = "someone/tiny-moe"
CARD = "---\nlibrary_name: ane-moe\n---\n"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    checkpoint = tiny_checkpoint("mixtral", folder / "checkpoint")
    return tiny_conversion(checkpoint, folder / "out", context=32, golden=True)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with served({}) as hub:
        hub.new = tmp_path / "repositories"
        point_at(hub, tmp_path, monkeypatch)
        # The server speaks LFS, as the Hub does to those who have no client of its newer storage.
        monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False)
        yield hub


def ran(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout


def test_what_is_pushed_is_pulled_and_verified(hub: Hub, out: Path, tmp_path: Path) -> None:
    code, text = ran("push", out, NAME, "--runtime", "reference")
    assert code == 0 and f"verify hf://{NAME}" in text
    (hub.models[NAME] / "code.py").write_text("raise SystemExit")  # named by nobody
    there = tmp_path / "there"
    code, text = ran("pull", NAME, there, "--json")
    manifest = read_manifest(out)
    assert code == 0 and json.loads(text)["files"] == len(manifest.files)
    names = {file.relative_to(there).as_posix() for file in there.rglob("*") if file.is_file()}
    assert names == {*manifest.files, FILE_NAME, "README.md"}
    for name in (*manifest.files, FILE_NAME):
        assert (there / name).read_bytes() == (out / name).read_bytes()
    assert verify(there, runtime="reference").passed
    with pytest.raises(UserError, match="holds something else"):
        pull(NAME, there)


def test_the_manifest_is_in_the_last_commit(
    hub: Hub, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pushing, "BATCH_FILES", 4)
    done = push(out, NAME, CARD)
    assert len(hub.commits) > 3 and max(map(len, hub.commits)) == 4
    assert hub.commits[-1] == ["README.md", FILE_NAME]
    assert not any(FILE_NAME in files for files in hub.commits[:-1])
    assert done.sent == sum(map(len, hub.commits))


def test_a_push_that_broke_off_goes_on(
    hub: Hub, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pushing, "BATCH_FILES", 2)
    hub.take = 3
    with pytest.raises(UserError, match=f"cannot be sent to {NAME}"):
        push(out, NAME, CARD)
    assert hub.commits and not any(FILE_NAME in files for files in hub.commits)
    with pytest.raises(UserError, match="is no conversion"):
        pull(NAME, tmp_path / "early")
    there, hub.take = sum(map(len, hub.commits)), None
    done = push(out, NAME, CARD)
    assert done.kept == there and done.sent == len(read_manifest(out).files) - there + 2
    again = push(out, NAME, CARD)
    assert (again.sent, again.sent_bytes) == (2, 0)


def test_small_files_are_told_apart_as_git_does(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"some\ncontent\0")
    told = subprocess.run(["git", "hash-object", file], capture_output=True, text=True, check=True)
    assert pushing._blob_id(file) == told.stdout.strip()


def test_a_file_that_the_manifest_does_not_mean_is_refused(
    hub: Hub, out: Path, tmp_path: Path
) -> None:
    push(out, NAME, CARD)
    (hub.models[NAME] / "embed.bin").write_bytes((out / "embed.bin").read_bytes()[::-1])
    with pytest.raises(UserError, match=r"embed\.bin is not the file that the manifest names"):
        pull(NAME, tmp_path / "there")
    assert [path.name for path in (tmp_path / "there").iterdir()] == [PARTIAL]
    with pytest.raises(UserError, match=r"embed\.bin is not the file that the manifest names"):
        pulled(f"hf://{NAME}")
    (hub.models[NAME] / "embed.bin").unlink()
    with pytest.raises(UserError, match=r"lacks a file that its manifest names; found: embed\.bin"):
        pull(NAME, tmp_path / "other")


def test_a_damaged_conversion_is_not_sent(hub: Hub, out: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(out, tmp_path / "damaged")
    (damaged / "embed.bin").write_bytes(bytes((damaged / "embed.bin").stat().st_size))
    with pytest.raises(UserError, match="is not the file that the manifest names"):
        push(damaged, NAME, CARD)
    assert not hub.commits and not hub.models


def test_a_manifest_that_names_files_outside_is_refused(
    hub: Hub, out: Path, tmp_path: Path
) -> None:
    push(out, NAME, CARD)
    manifest = read_manifest(out)
    evil = replace(manifest, files=manifest.files | {"../evil": "0" * 64})
    evil.write(hub.models[NAME])
    with pytest.raises(UserError, match="outside its folder"):
        pull(NAME, tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_a_pull_that_broke_off_goes_on(
    hub: Hub, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(out, NAME, CARD)
    whole = pulling._snapshot

    def broken(*arguments: Any) -> None:
        whole(*arguments)
        raise OSError("the line broke")

    monkeypatch.setattr(pulling, "_snapshot", broken)
    with pytest.raises(UserError, match="the line broke"):
        pull(NAME, tmp_path / "there")
    monkeypatch.setattr(pulling, "_snapshot", whole)
    before = hub.bytes_of("embed.bin")
    pull(NAME, tmp_path / "there")
    assert hub.bytes_of("embed.bin") == before and verify_files(tmp_path / "there", out)


def verify_files(there: Path, out: Path) -> bool:
    return all(sha256(there / name) == digest for name, digest in read_manifest(out).files.items())


def test_a_conversion_on_the_hub_stands_in_the_place_of_a_folder(
    hub: Hub, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(out, NAME, CARD)
    common = ("--prompt-ids", "3,4,5", "--max-tokens", 4, "--runtime", "reference", "--json")
    here, there = ran("generate", out, *common), ran("generate", f"hf://{NAME}@main", *common)
    ids = [json.loads(text)["ids"] for _, text in (here, there)]
    assert ids[0] == ids[1] and len(ids[0]) > 0
    assert ran("verify", f"hf://{NAME}", "--runtime", "reference", "--quick")[0] == 0

    def read(*_: object) -> None:
        raise AssertionError("a file is read again")

    monkeypatch.setattr("ane_moe.hub.digests.check_digests", read)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = pulled(f"hf://{NAME}")
    monkeypatch.setattr("ane_moe.hub.digests.check_digests", check_digests)
    (folder / "embed.bin").write_bytes(b"changed")
    with pytest.raises(UserError, match="is not the file that the manifest names"):
        pulled(f"hf://{NAME}")


def test_a_failed_gate_sends_nothing(hub: Hub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = replace(verify(out, runtime="reference"), passed=False)
    monkeypatch.setattr("ane_moe.verification.verify.verify", lambda *_, **__: failed)
    code, _ = ran("push", out, NAME)
    assert code == 1 and not hub.models


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "someone/tiny:Q4_K_M", "hf://"])
def test_what_is_no_name_is_one_line(hub: Hub, out: Path, name: str) -> None:
    for call in (lambda: push(out, name, CARD), lambda: pulled(name)):
        with pytest.raises(UserError, match="no repository of the Hub has this name"):
            call()


def test_the_card_says_what_the_gates_gave(hub: Hub, out: Path, tmp_path: Path) -> None:
    report = verify(out, runtime="reference")
    manifest = replace(
        read_manifest(out), origin={"hub": "mistralai/Mixtral", "revision": "abc123"}
    )
    data = replace(gather(out, verify=report), manifest=manifest)
    text = render_card(data, NAME, "apache-2.0")
    card = huggingface_hub.ModelCard(text)  # the Hub's own reader
    assert card.data.license == "apache-2.0" and card.data.base_model == "mistralai/Mixtral"
    assert "coreml" in card.data.tags and card.data.pipeline_tag == "text-generation"
    worst = min(row.cosine for row in report.shards if row.kind == "moe")
    assert f"| {worst:.6f} |" in text and "**ane-moe: passed**" in text
    assert "Speed, predicted (m4-max)" in text and "not measured" in text
    assert "mistralai/Mixtral at commit abc123" in text
    assert manifest.files["golden.safetensors"] in text
    assert all(number in text for number in manifest.versions.values())


def test_nothing_of_a_manifest_gets_out_of_the_front_matter(out: Path) -> None:
    evil = 'x"\n---\n# Title <script>'
    manifest = replace(read_manifest(out), family=evil, origin={"hub": evil})
    data = replace(gather(out), manifest=manifest)
    card = huggingface_hub.ModelCard(render_card(data, NAME, evil))
    assert card.data.base_model == evil and card.data.license == evil
    assert "<script>" not in card.text.split("## Use")[0]


def test_the_licence_is_the_base_models(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from ane_moe.hub.licence import licence_of

    assert licence_of({}) is None and licence_of({"hub": "no/where"}) is None
    info = huggingface_hub.hf_api.ModelInfo(id="a/b", cardData={"license": "mit"})
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
    assert licence_of({"hub": "a/b", "revision": "main"}) == "mit"
