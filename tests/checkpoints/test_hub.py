"""Checkpoints by their names on the Hub, from a server of this machine that speaks its routes."""

import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import huggingface_hub
import pytest
from gguf import GGMLQuantizationType as Kind
from typer.testing import CliRunner

from ane_moe.checkpoints import hub_range
from ane_moe.checkpoints.checkpoint import open_checkpoint
from ane_moe.checkpoints.hub import FILE, HubName, hub_name, local_folder
from ane_moe.checkpoints.weight_file import read_range
from ane_moe.cli import app
from ane_moe.conversion.pipeline import convert, plan
from ane_moe.conversion.plan import ConvertOptions
from ane_moe.errors import UserError
from ane_moe.families import describe
from ane_moe.fetched_folders import fetched_folders
from ane_moe.files import TEMPORARY
from ane_moe.forecast.outlook import outlook
from ane_moe.manifest import read_manifest
from ane_moe.user_cache import user_cache
from ane_moe.verification.verify import verify
from tests.checkpoints.gguf_models import make, save_both
from tests.checkpoints.hub_server import COMMIT, Hub, point_at, served
from tests.models import make_model, save_checkpoint

NAME = "someone/tiny-moe"
UNREAD = ("original/consolidated.00.pth", "model.gguf", "README.md", "pytorch_model.bin")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "model"
    model = make_model("qwen3_moe", num_hidden_layers=4, mlp_only_layers=[])
    save_checkpoint(model, folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    for name in UNREAD:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not read")
    return folder


@pytest.fixture
def hub(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with served({NAME: saved}) as hub:
        point_at(hub, tmp_path, monkeypatch)
        yield hub


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("owner/name", HubName("owner/name")),
        ("owner/name@v1.0", HubName("owner/name", "v1.0")),
        ("hf://owner/name@refs/pr/3", HubName("owner/name", "refs/pr/3")),
        ("hf:/owner/name", HubName("owner/name")),  # as pathlib has it
        ("owner/name-GGUF:Q4_K_M", HubName("owner/name-GGUF", None, "Q4_K_M")),
        ("owner/name@v1:IQ4_NL", HubName("owner/name", "v1", "IQ4_NL")),
        ("name", None),
        ("a/b/c", None),
        ("../owner", None),
        ("/owner/name", None),
    ],
)
def test_names_and_paths_are_told_apart(given: str, name: HubName | None) -> None:
    assert hub_name(given) == name


@pytest.mark.parametrize("revision", [None, "v1.0", "refs/pr/3"])
def test_a_file_is_told_from_the_revision_before_it(revision: str | None) -> None:
    at = f"@{revision}" if revision else ""
    found = FILE.fullmatch(f"hf://owner/name{at}/F16/a.gguf")
    assert found and found["revision"] == revision and found["file"] == "F16/a.gguf"


def test_a_path_that_is_there_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    assert hub_name("owner/name") is None


def test_a_model_is_converted_by_its_name(hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["convert", f"{NAME}@v1", str(out), "--context", "64", "--workers", "1"]
    result = CliRunner().invoke(app, [*command, "--golden"])
    assert result.exit_code == 0, result.output
    assert read_manifest(out).origin == {"hub": NAME, "revision": COMMIT}
    assert not {name for name, _, _ in hub.sent} & set(UNREAD)
    assert verify(out, runtime="reference").passed


def test_a_few_layers_fetch_their_tensors_alone(hub: Hub, saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["convert", NAME, str(out), "--context", "64", "--workers", "1", "--layers", "1,3"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert read_manifest(out).origin == {"hub": NAME, "revision": COMMIT}
    weights = [file for file in saved.iterdir() if file.suffix == ".safetensors"]
    fetched = sum(hub.bytes_of(file.name) for file in weights)
    assert 0.4 < fetched / sum(file.stat().st_size for file in weights) < 0.75
    whole = tmp_path / "whole"
    local = ["convert", str(saved), str(whole), *command[3:]]
    assert CliRunner().invoke(app, local).exit_code == 0
    ours, theirs = read_manifest(out).files, read_manifest(whole).files
    assert ours == theirs


def test_a_plan_and_a_dry_run_fetch_no_weights(hub: Hub, saved: Path, tmp_path: Path) -> None:
    found = outlook(NAME)
    assert found.refusal == "" and [name for name, _, _ in hub.sent] == ["config.json"]
    command = ["convert", NAME, str(tmp_path / "out"), "--context", "64", "--dry-run", "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    weights = [file for file in saved.iterdir() if file.suffix == ".safetensors"]
    headers = [int.from_bytes(file.read_bytes()[:8], "little") + 16 for file in weights]
    assert sum(hub.bytes_of(file.name) for file in weights) == sum(headers)
    planned = plan(Path(NAME), ConvertOptions(context=64))
    shown = [
        (shard["path"], shard["weight_bytes"]) for shard in json.loads(result.stdout)["shards"]
    ]
    assert [(shard.path, shard.weight_bytes) for shard in planned.shards] == shown


def test_a_download_that_broke_off_goes_on(
    hub: Hub, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = range(4)
    hub.break_after = 20_000  # of the next larger answer
    monkeypatch.setattr("ane_moe.addresses.TRIES", 1)
    with pytest.raises(UserError, match="cannot be fetched"):
        local_folder(NAME, layers)
    hub.break_after, before = None, len(hub.sent)
    folder = local_folder(NAME, layers)
    for file in saved.glob("*.safetensors"):
        assert (folder / file.name).read_bytes() == file.read_bytes()
    rest = len(hub.sent)
    assert local_folder(NAME, layers) == folder
    again = [name for name, _, _ in hub.sent[rest:] if name.endswith(".safetensors")]
    assert before and not again
    describe(open_checkpoint(folder))


def test_weights_that_stay_there_are_read_by_ranges(
    hub: Hub, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    hub.gated = ("hf_mine",)
    folder = local_folder(NAME, apart=True)
    sent = sum(count for name, _, count in hub.sent if name.endswith(".safetensors"))
    assert sent < 60_000 < sum(file.stat().st_size for file in saved.glob("*.safetensors"))
    there, here = open_checkpoint(folder), open_checkpoint(saved)
    assert there.origin == {"hub": NAME, "revision": COMMIT}
    assert f"hf://{NAME}@{COMMIT}, by byte ranges" in there.notes
    sources = describe(here)[1].values()
    assert describe(there)[1].keys() == describe(here)[1].keys()
    assert there.digest(sources) == here.digest(sources)
    assert "hf_mine" not in repr(there)
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    file = next(saved.glob("*.safetensors")).name
    with pytest.raises(UserError, match=rf"{file} cannot be read; found: the Hub answers 401"):
        read_range(f"hf://{NAME}@{COMMIT}/{file}", 0, 8)


@pytest.mark.parametrize(
    ("place", "sent"),
    [
        ("https://huggingface.co/a/b/resolve/main/c", True),
        ("https://huggingface.co.evil.example/a", False),
        ("https://huggingface.co@evil.example/a", False),
        ("https://huggingface.co:8443/a", False),
        ("http://huggingface.co/a", False),
        ("https://cdn-lfs.huggingface.co/a", False),
    ],
)
def test_a_token_goes_to_the_hub_alone(
    monkeypatch: pytest.MonkeyPatch, place: str, sent: bool
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://huggingface.co")
    headers = {"Authorization": "Bearer hf_mine", "user-agent": "ours"}
    assert ("Authorization" in hub_range._headers(place, headers)) == sent


def test_gguf_files_that_stay_there_are_read_by_ranges(hub: Hub, tmp_path: Path) -> None:
    hub.models |= gguf_models(tmp_path)
    one, parts = "someone/one-GGUF", "someone/several-GGUF"
    for name, apart, file in (
        (f"HF://{one}/tiny-Q8_0.gguf", False, tmp_path / "one" / "tiny-Q8_0.gguf"),
        (f"hf://{parts}@v1/F16/tiny-F16-00002-of-00002.gguf", False, tmp_path / "several" / "F16"),
        (f"{parts}:F16", True, tmp_path / "several" / "F16"),
    ):
        there, here = open_checkpoint(local_folder(name, apart=apart)), open_checkpoint(file)
        sources = describe(here)[1].values()
        assert there.digest(sources) == here.digest(sources), name
        assert there.origin["revision"] == COMMIT and there.origin["hub"] in name
    with pytest.raises(UserError, match=r"none\.gguf cannot be read; found: the Hub answers 404"):
        local_folder(f"hf://{one}/none.gguf")


def test_what_was_fetched_is_found_without_a_network(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = local_folder(NAME)
    hub.models.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert local_folder(NAME) == folder
    with pytest.raises(UserError, match=r"other/model cannot be fetched"):
        local_folder("other/model")


def test_what_is_wrong_is_one_line(hub: Hub, saved: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "README.md").write_text("nothing")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(saved / "config.json", pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"")
    hub.models |= {"someone/bare": bare, "someone/pickled": pickled}
    reasons = {
        "someone/none": "cannot be fetched",
        f"{NAME}@no-such-branch": "cannot be fetched",
        "someone/bare": "has no config.json",
        "someone/pickled": "has no safetensors weights",
    }
    for name, reason in reasons.items():
        result = CliRunner().invoke(app, ["convert", name, str(tmp_path / "out")])
        assert isinstance(result.exception, UserError) and reason in str(result.exception), name
        with pytest.raises(UserError, match=reason):
            convert(Path(name), tmp_path / "out")
        assert not (tmp_path / "out").exists()


def gguf_models(folder: Path) -> dict[str, Path]:
    """Repositories as they are published: one file, several kinds, parts in a folder."""
    file, _ = save_both(make("qwen3_moe", num_hidden_layers=2), folder, Kind.Q8_0)
    parts, _ = save_both(make("qwen3_moe", num_hidden_layers=2), folder / "in", Kind.F16, parts=2)
    one, several = folder / "one", folder / "several"
    one.mkdir()
    (several / "F16").mkdir(parents=True)
    shutil.copy(file, one / "tiny-Q8_0.gguf")
    (one / "mmproj-F16.gguf").write_bytes(b"a vision tower")
    shutil.copy(file, several / "tiny-Q8_0.gguf")
    shutil.copy(file, several / "tiny.i1-IQ4_XS.gguf")
    for part in parts.parent.glob("*.gguf"):
        shutil.copy(part, several / "F16" / part.name.replace("model-", "tiny-F16-"))
    return {"someone/one-GGUF": one, "someone/several-GGUF": several}


def test_a_gguf_model_is_fetched_by_its_name_and_kind(hub: Hub, tmp_path: Path) -> None:
    hub.models |= gguf_models(tmp_path)
    (tmp_path / "several" / "model.safetensors").write_bytes(b"not read")
    expected = {
        "someone/one-GGUF": "tiny-Q8_0.gguf",
        "someone/one-GGUF:q8_0": "tiny-Q8_0.gguf",
        "someone/several-GGUF:Q8_0": "tiny-Q8_0.gguf",
        "someone/several-GGUF@v1:iq4_xs": "tiny.i1-IQ4_XS.gguf",
        "someone/several-GGUF:F16": "F16/tiny-F16-00001-of-00002.gguf",
    }
    for name, file in expected.items():
        path = local_folder(name)
        assert path.as_posix().endswith(f"/{COMMIT}/{file}"), name
        checkpoint = open_checkpoint(path)
        describe(checkpoint)
        assert checkpoint.origin == {"hub": name.split("@")[0].split(":")[0], "revision": COMMIT}
    assert not {name for name, _, _ in hub.sent} & {"model.safetensors", "mmproj-F16.gguf"}
    before = len(hub.sent)
    assert open_checkpoint(local_folder("someone/several-GGUF:F16", ())).config["num_experts"]
    assert {name for name, _, _ in hub.sent[before:]} == {
        f"F16/tiny-F16-0000{part}-of-00002.gguf" for part in (1, 2)
    }


def test_runs_that_fetch_one_model_at_once_wait_for_each_other(
    hub: Hub, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.models |= gguf_models(tmp_path)
    range_at, both, asked = hub_range.range_at, threading.Barrier(2), []

    def slowly(place: str, first: int, last: int) -> bytes:
        with suppress(threading.BrokenBarrierError):
            both.wait(0.2)  # until the other one is here, too
        asked.append((place, first, last))
        return range_at(place, first, last)

    monkeypatch.setattr("ane_moe.checkpoints.hub.range_at", slowly)
    for name, layers, there in (
        (NAME, range(4), saved),
        ("someone/several-GGUF:F16", (), tmp_path / "several" / "F16"),
    ):
        both.reset()
        with ThreadPoolExecutor(2) as pool:
            found = {*pool.map(local_folder, [name] * 2, [layers] * 2)}
        assert len(found) == 1
        folder = found.pop() if layers else found.pop().parent
        weights = [*there.glob("*.safetensors"), *there.glob("*.gguf")]
        weights = [file for file in weights if file.name not in UNREAD]
        assert all((folder / file.name).read_bytes() == file.read_bytes() for file in weights)
        assert weights and not [*folder.glob(f"{TEMPORARY}*")]
    assert len({*asked}) == len(asked)  # each range of them once
    kept = {(one.origin, one.holds) for one in fetched_folders(user_cache())}
    at_commit = (f"hf://{name}@{COMMIT}" for name in (NAME, "someone/several-GGUF"))
    assert kept == {*zip(at_commit, ("layers 0 1 2 3", "headers"), strict=True)}


def test_a_gguf_model_that_is_not_told_apart_is_one_line(hub: Hub, tmp_path: Path) -> None:
    hub.models |= gguf_models(tmp_path)
    reasons = {
        "someone/several-GGUF": "has several GGUF models; found: F16, IQ4_XS, Q8_0; name one:",
        "someone/several-GGUF:Q5_K_M": "no GGUF model of kind Q5_K_M; found: F16, IQ4_XS, Q8_0;",
        f"{NAME}:Q4_K_M": "no GGUF model of kind Q4_K_M",
    }
    for name, reason in reasons.items():
        with pytest.raises(UserError) as caught:
            local_folder(name)
        assert reason in str(caught.value) and "\n" not in str(caught.value), name


def test_the_manifest_says_nothing_of_a_local_folder(saved: Path) -> None:
    assert open_checkpoint(saved).origin == {}
    assert json.loads((saved / "config.json").read_text())["model_type"] == "qwen3_moe"
