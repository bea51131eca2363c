"""Checkpoints at addresses, read by byte ranges: from web servers of this machine, and from
fsspec's own memory."""

import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import fsspec
import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from ane_moe.addresses import address, named, reason_of, tried
from ane_moe.checkpoints import weight_file
from ane_moe.checkpoints.checkpoint import open_checkpoint
from ane_moe.checkpoints.hub import local_folder
from ane_moe.checkpoints.remote import url_of
from ane_moe.checkpoints.weight_file import RemoteFile, read_range
from ane_moe.cli import app
from ane_moe.conversion.pipeline import ConvertOptions, convert
from ane_moe.errors import UserError
from ane_moe.files import TEMPORARY
from ane_moe.forecast.outlook import outlook
from ane_moe.hub.fetched import fetched
from ane_moe.remote_folder import RemoteFolder
from ane_moe.verification.verify import verify
from tests.checkpoints.hub_server import Hub, _Handler
from tests.conversion.test_convert import contents
from tests.models import make_model, save_checkpoint

OPTIONS = ConvertOptions(prefill=0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote") / "model"
    model = make_model("mixtral")
    save_checkpoint(model, folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder


@pytest.fixture(scope="module")
def local(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("conversion") / "out"
    convert(saved, out, OPTIONS, golden=True)
    return out


@contextmanager
def web_server(folder: Path, ranges: bool = True) -> Iterator[Hub]:
    """Serves the files of a folder as `/model/...`, and lists none."""
    hub = Hub({"model": folder})

    class Handler(_Handler):
        state = hub

        def _answer(self, body: bool) -> None:
            if not ranges:
                del self.headers["Range"]
            name = unquote(self.path).removeprefix("/model/")
            if not (folder / name).is_file():
                return self._failed("EntryNotFound")
            self._file(name, (folder / name).read_bytes(), body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}/model"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def memory(saved: Path) -> Iterator[str]:
    files = fsspec.filesystem("memory")
    for path in saved.iterdir():
        files.pipe(f"/models/tiny/{path.name}", path.read_bytes())
    yield "memory://models/tiny"
    files.rm("/models", recursive=True)
    weight_file._block.cache_clear()


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        (Path("s3://bucket/a"), "s3://bucket/a"),
        (Path("https://host:81/a"), "https://host:81/a"),
        ("S3://Bucket/a", "s3://Bucket/a"),
        ("hf://owner/name", None),
        ("HF://owner/name", None),
        (Path("FILE:///a/b"), None),
        ("profile://a/b", "profile://a/b"),
        (Path("file:///a/b"), None),
        ("owner/name", None),
        ("owner/name:Q4_K_M", None),
        ("/a/b", None),
        ("c:/model", None),
    ],
)
def test_an_address_is_told_from_paths_and_names(given: str | Path, found: str | None) -> None:
    assert address(given) == found


@pytest.mark.parametrize(
    "given",
    [
        "http://me:SECRET@host/out",
        "https://SECRET@host:8443/out",
        Path("sftp://me:SECRET@host/out"),
        "https://host/get?token=SECRET&path=/out",
    ],
)
def test_an_address_that_gives_access_is_refused_and_not_shown(given: str | Path) -> None:
    for open_it in (address, local_folder):
        with pytest.raises(UserError, match=r"host\S* has a password or a query in it") as raised:
            open_it(given)
        assert "SECRET" not in str(raised.value)
    assert address("abfs://container@account.dfs.core.windows.net/out")  # a name


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        (
            "403, message='Forbidden', url='https://cdn.host/a/b?X-Amz-Signature=SECRET&X=1'",
            "403, message='Forbidden', url='https://cdn.host/a/b?...'",
        ),
        (
            "Max retries exceeded with url: /b?se=2026&sig=SECRET (refused)",
            "Max retries exceeded with url: /b?... (refused)",
        ),
        ("no proxy http://me:SE@CRET@proxy:80/ there", "no proxy http://...@proxy:80/ there"),
        ("is it there? x=3, a@b", "is it there? x=3, a@b"),
    ],
)
def test_what_libraries_say_is_shown_without_secrets(told: str, shown: str) -> None:
    assert reason_of(OSError(told)) == shown
    assert str(UserError("it broke", told)) == f"it broke; found: {shown}"
    assert "SECRET" not in reason_of(OSError("x" * 150 + told))


def test_a_name_is_shown_as_it_is_given() -> None:
    for given in ("hf://owner/name@v1", "s3://bucket/a", "/a/b", "demo"):
        assert named(Path(given)) == given


def test_tensors_come_by_ranges_and_are_those_of_the_file(saved: Path, memory: str) -> None:
    there, here = open_checkpoint(memory), open_checkpoint(saved)
    assert there.tensors.keys() == here.tensors.keys()
    assert there.notes[0] == f"{memory}, by byte ranges"
    stored = {
        key: value for file in saved.glob("*.safetensors") for key, value in load_file(file).items()
    }
    for key, tensor in there.tensors.items():
        assert isinstance(tensor.path, RemoteFile)
        np.testing.assert_array_equal(there.made(key), stored[tensor.key])


def test_what_is_converted_and_proved_at_an_address_is_what_is_here(
    saved: Path, local: Path, memory: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = convert(Path(memory), out, OPTIONS, golden=True)
    assert contents(out) == contents(local)
    assert not convert(saved, out, OPTIONS).written  # nor is anything else to be done here
    assert f"{memory}, by byte ranges" in report.notes
    assert verify(out, checkpoint=Path(memory), runtime="reference").passed


def test_a_web_server_that_lists_nothing_is_asked_for_ranges_alone(
    saved: Path, local: Path, tmp_path: Path
) -> None:
    pytest.importorskip("aiohttp")
    with web_server(saved) as server:
        folder = local_folder(server.endpoint)
        headers = sum(
            8 + int.from_bytes(file.read_bytes()[:8], "little") + 8
            for file in saved.glob("*.safetensors")
        )
        weights = [name for name, _, _ in server.sent if name.endswith(".safetensors")]
        assert sum(map(server.bytes_of, set(weights))) == headers
        assert url_of(folder) == server.endpoint
        convert(Path(server.endpoint), tmp_path / "out", OPTIONS)
        ours, theirs = contents(tmp_path / "out"), contents(local)
        assert all(theirs[name] == data for name, data in ours.items() if "shard" in name)
        assert {name for name in ours if "mlpackage" in name} == {
            name for name in theirs if "mlpackage" in name
        }


def test_gguf_files_at_an_address_are_read_by_ranges(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    pytest.importorskip("gguf")
    from gguf import GGMLQuantizationType as Kind

    from tests.checkpoints.gguf_models import make, save_both

    (tmp_path / "model").mkdir()
    first, _ = save_both(make("olmoe", num_hidden_layers=2), tmp_path / "model", Kind.Q8_0, parts=2)
    files = fsspec.filesystem("memory")
    for part in first.parent.glob("*.gguf"):
        files.pipe(f"/gguf/tiny/{part.name}", part.read_bytes())
    convert(first, tmp_path / "here", OPTIONS, golden=True)
    with web_server(first.parent) as server:
        for given in ("memory://gguf/tiny", f"{server.endpoint}/{first.name}"):
            there = open_checkpoint(given)
            assert any("by byte ranges" in note for note in there.notes)
        sent = sum(count for _, _, count in server.sent)
        assert sent < sum(part.stat().st_size for part in first.parent.glob("*.gguf")) * 2
        out = tmp_path / "there"
        convert(Path(f"{server.endpoint}/{first.name}"), out, OPTIONS, golden=True)
    assert contents(out) == contents(tmp_path / "here")
    files.pipe("/gguf/tiny/another.gguf", b"GGUF")
    with pytest.raises(UserError, match="memory://gguf/tiny holds more than one GGUF model"):
        open_checkpoint("memory://gguf/tiny")
    with pytest.raises(UserError, match=r"another\.gguf is not a sound GGUF file"):
        open_checkpoint("memory://gguf/tiny/another.gguf")
    files.rm("/gguf", recursive=True)


def test_a_plan_is_made_of_headers_at_an_address(saved: Path, memory: str) -> None:
    there, here = outlook(memory), outlook(saved)
    assert there.choices and there.choices == here.choices


@pytest.mark.parametrize("length", [True, False])
def test_a_weight_file_whose_size_nobody_tells_is_one_line(saved: Path, length: bool) -> None:
    pytest.importorskip("aiohttp")
    with web_server(saved) as server:
        server.untold = ".json" if length else ".safetensors"
        if length:  # small files are read to their end
            assert open_checkpoint(server.endpoint).tensors
            return
        with pytest.raises(UserError, match=r"safetensors has no size that its server tells"):
            open_checkpoint(server.endpoint)


@pytest.mark.parametrize("name", ["../model/config.json", "model/config.json", ".."])
def test_an_index_cannot_name_files_elsewhere(saved: Path, tmp_path: Path, name: str) -> None:
    served = Path(shutil.copytree(saved, tmp_path / "model"))
    index = json.loads((served / "model.safetensors.index.json").read_text())
    index["weight_map"]["other"] = name
    (served / "model.safetensors.index.json").write_text(json.dumps(index))
    with web_server(served) as server:
        folder = local_folder(server.endpoint)
    expected = {path.name for path in saved.iterdir()} - {"README.md"} | {".address"}
    assert {path.name for path in folder.iterdir()} <= expected
    assert not (folder.parent / "model").exists()


def test_a_weight_file_that_its_server_lacks_is_one_line(saved: Path, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    served = Path(shutil.copytree(saved, tmp_path / "model"))
    lacking = next(served.glob("*.safetensors"))
    lacking.unlink()
    with web_server(served) as server, pytest.raises(UserError, match="cannot be read") as raised:
        local_folder(server.endpoint)
    assert f"{server.endpoint}/{lacking.name}" in str(raised.value)


@pytest.mark.parametrize("named", [["x"], {}, 3, None])
def test_an_index_that_names_no_files_is_one_line(memory: str, named: object) -> None:
    index = json.dumps({"weight_map": {"a": named}}).encode()
    fsspec.filesystem("memory").pipe("/models/tiny/model.safetensors.index.json", index)
    with pytest.raises(UserError, match="has no safetensors weights"):
        local_folder(memory)


def test_a_line_that_breaks_is_asked_again_and_a_dead_one_is_said(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp")
    monkeypatch.setattr("ane_moe.addresses.PAUSE_SECONDS", 0.01)
    file = next(saved.glob("*.safetensors"))
    with web_server(saved) as server:
        url, server.break_after = f"{server.endpoint}/{file.name}", 100
        assert read_range(url, 8, 5000) == file.read_bytes()[8:5000]
        assert server.break_after is None  # it broke
    dead = f"http://127.0.0.1:1/model/{file.name}"
    with pytest.raises(UserError, match=rf"{dead} cannot be read; found: .*127\.0\.0\.1") as raised:
        read_range(dead, 8, 5000)
    assert "\n" not in str(raised.value)


class Answer(Exception):
    """As libraries give what a web server says."""

    def __init__(self, status: int, **headers: str):
        self.status, self.headers = status, headers


@pytest.mark.parametrize(
    ("error", "pauses"),
    [
        (ConnectionResetError("the line broke"), [0.5, 1, 2, 4]),
        (Answer(503), [0.5, 1, 2, 4]),
        (Answer(429, **{"Retry-After": "3"}), [3, 3, 3, 4]),
        (Answer(429, RateLimit='"api";r=0;t=55'), [55] * 4),
        (Answer(403), []),
        (PermissionError("Access Denied"), []),
    ],
)
def test_what_may_pass_is_asked_five_times_and_a_refusal_once(
    monkeypatch: pytest.MonkeyPatch, error: Exception, pauses: list[float]
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("ane_moe.addresses.time.sleep", slept.append)

    def failing() -> None:
        raise error

    with pytest.raises(type(error)):
        tried(failing)
    assert slept == pauses


def test_a_small_file_that_is_large_is_not_read(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ane_moe.addresses.MAX_SMALL_BYTES", 100)
    files = fsspec.filesystem("memory")
    files.pipe("/models/tiny/runtime_meta.json", bytes(101))
    monkeypatch.setattr(type(files), "cat_file", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(UserError, match=r"runtime_meta\.json is too large; found: 101 bytes"):
        fetched(memory)


def test_what_is_no_package_is_not_fetched(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RemoteFolder, "fetch", lambda *_: pytest.fail("it was fetched"))
    result = CliRunner().invoke(app, ["inspect", memory])
    assert isinstance(result.exception, UserError) and f"{memory} is no package" in str(
        result.exception
    )


def test_a_server_that_gives_whole_files_is_refused(saved: Path) -> None:
    pytest.importorskip("aiohttp")
    with (
        web_server(saved, ranges=False) as server,
        pytest.raises(UserError, match=r"is not given by ranges; found: .* were asked for"),
    ):
        open_checkpoint(server.endpoint)


def test_a_file_that_changed_is_fetched_again_and_one_that_went_goes(
    saved: Path, memory: str
) -> None:
    folder = local_folder(memory)
    before = (folder / "config.json").stat().st_mtime_ns
    assert local_folder(memory) == folder  # nothing is written twice
    assert (folder / "config.json").stat().st_mtime_ns == before
    files = fsspec.filesystem("memory")
    config = json.loads((saved / "config.json").read_text()) | {"rms_norm_eps": 0.5}
    files.pipe("/models/tiny/config.json", json.dumps(config).encode())
    files.rm("/models/tiny/generation_config.json")
    folder = local_folder(memory)
    assert open_checkpoint(memory).config["rms_norm_eps"] == 0.5
    assert not (folder / "generation_config.json").exists()


def test_what_another_run_is_writing_stays(memory: str) -> None:
    folder = local_folder(memory)
    others = [folder / f"{TEMPORARY}{writer}config.json" for writer in ("", "1-")]
    for other in others:
        other.write_text("half")
    (folder / "config.json").unlink()
    local_folder(memory)
    assert (folder / "config.json").is_file() and all(map(Path.is_file, others))
    os.utime(others[0], (0, 0))  # of a run that was killed
    local_folder(memory)
    assert [other.exists() for other in others] == [False, True]
    others[1].unlink()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nowhere://a/b", "nowhere://a/b is at no known kind of place"),
        ("memory://empty", "memory://empty has no config.json"),
    ],
)
def test_what_is_at_no_place_is_one_line(url: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        open_checkpoint(url)


def test_a_folder_outside_the_cache_is_not_read_from_elsewhere(memory: str, tmp_path: Path) -> None:
    """Nor is what was fetched, the headers alone, taken for weights, which would be zeros."""
    fetched = local_folder(memory)
    assert isinstance(next(iter(open_checkpoint(fetched).tensors.values())).path, RemoteFile)
    (tmp_path / "link").symlink_to(fetched)
    linked = open_checkpoint(tmp_path / "link").tensors.values()
    assert all(isinstance(tensor.path, RemoteFile) for tensor in linked)
    copied = Path(shutil.copytree(fetched, tmp_path / "model"))
    with pytest.raises(UserError, match="headers of weight files alone; found: memory://"):
        open_checkpoint(copied)
