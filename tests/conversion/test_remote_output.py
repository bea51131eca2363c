"""Conversions into an address are those of a folder, byte for byte, whatever befalls on the way."""

import errno
import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import urlopen

import fsspec
import pytest
from typer.testing import CliRunner

from ane_moe import remote_folder
from ane_moe.addresses import output_place
from ane_moe.cli import app
from ane_moe.conversion.output_folder import MARKER
from ane_moe.conversion.pipeline import ConvertOptions, convert
from ane_moe.emit.coreml.package import WEIGHTS
from ane_moe.errors import DiskFull, UserError
from ane_moe.fetch_lock import in_use
from ane_moe.files import sha256
from ane_moe.formats.recipe import find_recipe
from ane_moe.hub.fetched import address_of, fetched
from ane_moe.manifest import FILE_NAME, read_manifest
from ane_moe.origins import note_origin, origin_of, shown
from ane_moe.remote_folder import RemoteFolder, SentFile, at_hand
from tests.conversion import bucket
from tests.conversion.test_convert import contents
from tests.models import make_model, save_checkpoint

OPTIONS = ConvertOptions(prefill=0, recipe=find_recipe("int8"), calibrate="builtin")
URL = "bucket://some/out"
SHARD = "moe/layer_01.mlpackage"
KEY = f"{SHARD}/Data/com.apple.CoreML/model.mlmodel"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(make_model("mixtral"), tmp_path_factory.mktemp("model") / "checkpoint")


@pytest.fixture(scope="module")
def local(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("conversion") / "out"
    convert(checkpoint, out, OPTIONS, golden=True)
    return out


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder behind URL."""
    monkeypatch.setattr("ane_moe.addresses.PAUSE_SECONDS", 0.001)
    monkeypatch.setenv("ANE_MOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(bucket.VARIABLE, "")
    (tmp_path / "store").mkdir()
    bucket.begin(tmp_path / "store")
    yield tmp_path / "store" / "some" / "out"


def ran(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None, result.exception
    return result


def test_what_is_put_at_an_address_is_what_a_folder_would_have(
    checkpoint: Path, local: Path, there: Path
) -> None:
    report = convert(checkpoint, Path(URL), OPTIONS, golden=True)
    assert not report.reused and contents(there) == contents(local)
    order = sorted(there.rglob("*"), key=lambda path: path.stat().st_mtime_ns)
    assert [path for path in order if path.is_file()][-1].name == FILE_NAME
    again = convert(checkpoint, Path(URL), OPTIONS, golden=True)
    assert not again.written and again.golden_kept and contents(there) == contents(local)


def test_either_goes_on_where_the_other_stopped(
    checkpoint: Path, local: Path, there: Path, tmp_path: Path
) -> None:
    shutil.copytree(local, there)
    (there / KEY).unlink()  # a worker was killed before it put the last file of a shard
    (there / "attn/layer_00.mlpackage" / WEIGHTS).unlink()  # and somebody lost another
    (there / FILE_NAME).rename(there / MARKER)
    source = json.loads((there / MARKER).read_text())["source"]
    (there / MARKER).write_text(json.dumps(source, sort_keys=True) + "\n")
    report = convert(checkpoint, Path(URL), OPTIONS, golden=True)
    assert report.written == ("attn/layer_00.mlpackage", SHARD) and contents(there) == contents(
        local
    )
    here = Path(shutil.copytree(there, tmp_path / "here"))
    assert not convert(checkpoint, here, OPTIONS, golden=True).written


@pytest.mark.parametrize(
    "changed",
    [
        {"routing": "stream"},
        pytest.param({"routing": "sparse"}, marks=pytest.mark.slow),
        pytest.param({"format": "aimodel"}, marks=pytest.mark.slow),
    ],
)
def test_stores_and_assets_go_the_same_way(
    checkpoint: Path, there: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    options = replace(OPTIONS, calibrate=None, **changed)
    convert(checkpoint, tmp_path / "out", options)
    convert(checkpoint, Path(URL), options)
    assert contents(there) == contents(tmp_path / "out")
    (there / FILE_NAME).unlink()
    (there / MARKER).write_text(
        json.dumps(read_manifest(tmp_path / "out").source, sort_keys=True) + "\n"
    )
    assert not convert(checkpoint, Path(URL), options).written


def test_commands_read_it_from_there(local: Path, there: Path, tmp_path: Path) -> None:
    shutil.copytree(local, there)
    (there / "beside.txt").write_text("named by nobody")
    verified = ran("verify", URL, "--runtime", "reference", "--quick").stdout
    assert f"passed what a quick look sees  {URL}: " in verified
    assert f"next: ane-moe report {URL}\n" in verified and "cache" not in verified
    common = ("--prompt-ids", "3,4,5", "--max-tokens", 3, "--runtime", "reference", "--json")
    ids = [json.loads(ran("generate", out, *common).stdout)["ids"] for out in (local, URL)]
    assert ids[0] == ids[1] and ids[0]
    shown = [json.loads(ran("inspect", f"{out}/{SHARD}", "--json").stdout) for out in (local, URL)]
    assert shown[0]["functions"] == shown[1]["functions"]
    folder = fetched(URL)
    assert contents(folder) == contents(local) and address_of(folder) == RemoteFolder(URL)
    in_use.clear()  # as in another process
    ran("cache", "--remove", URL)
    assert not folder.exists() and contents(fetched(URL)) == contents(local)
    (there / "embed.bin").write_bytes(b"another")
    (there / FILE_NAME).write_text((there / FILE_NAME).read_text() + "\n")
    with pytest.raises(UserError, match=r"embed\.bin is not the file that was written"):
        fetched(URL)
    (there / FILE_NAME).unlink()
    with pytest.raises(UserError, match=f"{URL} is not a finished conversion"):
        fetched(URL)


def test_what_commands_say_and_write_is_not_of_the_cache(
    local: Path, there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: str) -> str:
        return str(CliRunner().invoke(app, arguments).exception)

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for command in (("push", URL, "me/model"), ("report", URL)):
        assert f"{URL} is not a finished conversion" in refused(*command)
    for command in ("inspect", "diff"):
        assert f"{URL}/{SHARD} is no package" in refused(command, f"{URL}/{SHARD}")
    shutil.copytree(local, there)
    assert ran("diff", f"{URL}/{SHARD}").exit_code == 0
    assert f" {URL}/{SHARD} " in ran("inspect", f"{URL}/{SHARD}").stdout
    assert json.loads(ran("inspect", f"{URL}/{SHARD}", "--json").stdout)["path"] == f"{URL}/{SHARD}"
    assert "report: report.html" in ran("report", URL, "--no-verify").stdout
    page = (tmp_path / "here" / "report.html").read_text()
    assert URL in page and str(tmp_path) not in page
    assert not [*(tmp_path / "cache").rglob("report.html")]
    manifest = json.loads((there / FILE_NAME).read_text())
    manifest["shards"].pop()
    (there / FILE_NAME).write_text(json.dumps(manifest))
    message = refused("generate", URL, "--prompt-ids", "1")
    assert f"{URL}: lm_head" in message and str(tmp_path) not in message


def test_a_folder_is_called_by_its_origin_wherever_it_is_named(tmp_path: Path) -> None:
    origin, here = "hf://me/a@c0ffee", tmp_path / "hub" / "layers_1"
    note_origin(here, origin)
    raised = UserError(f"{here}/a.bin is odd", f"in {here}", f"see {here}, {here}_2 and {here}.old")
    assert str(raised) == (
        f"{origin}/a.bin is odd; found: in {origin}; see {origin}, {here}_2 and {origin}.old"
    )
    assert (shown(here), shown(tmp_path)) == (origin, str(tmp_path))
    assert (origin_of(here), origin_of(tmp_path)) == (origin, None)


def test_a_relative_folder_is_called_by_its_origin_once_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    here = Path("cache-of-mine/remote/0123")
    note_origin(here, URL)
    note_origin(here / "below", f"{URL}2")
    for text, said in {
        f"{here.absolute()}/x and {here}/y": f"{URL}/x and {URL}/y",
        f"'{here}', {here}/below/x": f"'{URL}', {URL}2/x",
        f"/other/{here}/x, my{here}": f"/other/{here}/x, my{here}",
    }.items():
        assert str(UserError(text)) == said


def test_runs_that_fetch_one_address_at_once_wait_for_each_other(
    local: Path, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(local, there)
    both, opened, fetch = threading.Barrier(2), [], RemoteFolder.fetch

    def slowly(self: RemoteFolder, name: str, path: Path) -> None:
        with suppress(threading.BrokenBarrierError):
            both.wait(0.2 if len(opened) < 2 else 0)  # until the other one is here, too
        opened.append(name)
        fetch(self, name, path)

    monkeypatch.setattr(RemoteFolder, "fetch", slowly)
    with ThreadPoolExecutor(2) as pool:
        folders = {*pool.map(fetched, [URL, URL])}
    assert len(folders) == 1 and contents(folders.pop()) == contents(local)
    assert sorted(opened) == sorted(read_manifest(local).files)  # each of them once


def test_a_store_that_refuses_is_one_line_and_nothing_is_lost(
    checkpoint: Path, local: Path, there: Path
) -> None:
    for what, named, after, said in (
        ("denied", MARKER, 0, "Access Denied"),
        ("full", "weight.bin", 1, "No space left on the store"),
        ("broken", "weight.bin", 1, "the line broke"),
    ):
        bucket.befall(what, named, after)
        with pytest.raises(UserError, match=f"{named} cannot be written; found: .*{said}") as e:
            convert(checkpoint, Path(URL), OPTIONS, golden=True)
        assert "\n" not in str(e.value) and there.exists() == (what != "denied")
    bucket.befall()
    report = convert(checkpoint, Path(URL), OPTIONS, golden=True)
    assert len(report.reused) == 2 and contents(there) == contents(local)


def test_a_full_disk_here_is_not_the_addresss_fault(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there.mkdir(parents=True)
    (there / "a").write_text("a")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(bucket.Bucket, "get_file", full)
    with (
        pytest.raises(DiskFull, match="the disk is full: a was not written"),
        at_hand(SentFile(RemoteFolder(URL), "a", "0")),
    ):
        pass


def test_what_does_not_fit_is_not_begun_to_be_fetched(
    local: Path, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(local, there)
    files = [local / name for name in read_manifest(local).files]
    needed = sum(path.stat().st_size for path in files)
    package = sum(path.stat().st_size for path in (local / SHARD).rglob("*") if path.is_file())
    asked, get = [], bucket.Bucket.get_file
    monkeypatch.setattr(bucket.Bucket, "get_file", lambda *a, **k: asked.append(a) or get(*a, **k))
    free = SimpleNamespace(free=0)
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    free.free = needed - 1
    with pytest.raises(DiskFull, match=f"the disk is too full for {URL}; found: .* MB needed"):
        fetched(URL)
    free.free = package - 1
    result = CliRunner().invoke(app, ["inspect", f"{URL}/{SHARD}"])
    assert f"the disk is too full for {URL}/{SHARD}" in str(result.exception) and not asked
    free.free = needed
    assert contents(fetched(URL)) == contents(local) and len(asked) == len(files)


def test_what_is_held_by_something_else_stays(checkpoint: Path, there: Path, local: Path) -> None:
    there.mkdir(parents=True)
    (there / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=f"{URL} holds something else"):
        convert(checkpoint, Path(URL), OPTIONS)
    assert [path.name for path in there.iterdir()] == ["mine.txt"]
    (there / "mine.txt").unlink()
    convert(checkpoint, Path(URL), replace(OPTIONS, layers=(0,), calibrate=None))
    with pytest.raises(UserError, match=f"{URL} holds another conversion; name another"):
        convert(checkpoint, Path(URL), OPTIONS)
    (there / "mine.txt").write_text("mine")
    (there / "moe" / "layer_09.mlpackage").mkdir()
    (there / "moe" / "layer_09.mlpackage" / "old").write_text("old")
    convert(checkpoint, Path(URL), OPTIONS, golden=True, overwrite=True)
    (there / "mine.txt").unlink()
    (there / "moe" / "layer_09.mlpackage").rmdir()
    assert contents(there) == contents(local)


@pytest.mark.parametrize("at_an_address", [True, False])
def test_a_run_again_deletes_what_is_of_this_conversion_alone(
    checkpoint: Path, local: Path, there: Path, tmp_path: Path, at_an_address: bool
) -> None:
    out = there if at_an_address else tmp_path / "out"
    shutil.copytree(local, out)
    others = ("child", "moe/child", "moe/layer_07.mlpackage", "golden/child")
    for child in others:
        shutil.copytree(local, out / child)
    (out / "begun" / "attn" / ".writing-layer_00.mlpackage").mkdir(parents=True)
    (out / "begun" / MARKER).write_text("{}")
    mine = ("mine.txt", "router/mine.txt", "experts/mine.bin", "mine/layer_00.mlpackage/mine")
    ours = ("router/layer_00.bin", "moe/.writing-x/a", ".writing-b", "attn/a.aimodel/a")
    for name in (*mine, *ours, "begun/attn/.writing-layer_00.mlpackage/a"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("")
    before = contents(out)
    convert(checkpoint, Path(URL) if at_an_address else out, OPTIONS, golden=True)
    assert before.keys() - contents(out).keys() == {*ours}
    assert all(contents(out / child) == contents(local) for child in others)


def test_whoever_finds_another_conversion_begun_there_stops(
    checkpoint: Path, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = '{"config": "another", "options": "another"}\n'
    put = bucket.Bucket.put_file

    def raced(self: Any, lpath: str, rpath: str, **named: Any) -> None:
        put(self, lpath, rpath, **named)
        if rpath.endswith(f"attn/layer_00.mlpackage/{KEY.partition('.mlpackage/')[2]}"):
            (there / MARKER).write_text(other)

    monkeypatch.setattr(bucket.Bucket, "put_file", raced)
    with pytest.raises(UserError, match=f"{URL} holds another conversion"):
        convert(checkpoint, Path(URL), OPTIONS)
    assert (there / MARKER).read_text() == other and not (there / FILE_NAME).exists()


@pytest.mark.parametrize("cluster", [None, "tcp://127.0.0.1:1"])
@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("hf://me/model", "hf://me/model is on the Hugging Face Hub.*`ane-moe push FOLDER"),
        ("HF://me/model", "is on the Hugging Face Hub"),
        ("s3://", "s3:// is no address"),
        ("simplecache::s3://b/o", "simplecache::s3://b/o is no address"),
    ],
)
def test_what_only_looks_like_an_address_is_no_folder(
    checkpoint: Path, there: Path, tmp_path: Path, out: str, said: str, cluster: str | None
) -> None:
    with pytest.raises(UserError, match=said):
        convert(checkpoint, Path(out), OPTIONS, cluster=cluster)
    assert not Path(out).exists()


def test_a_folder_and_a_store_have_more_than_one_spelling(
    local: Path, there: Path, tmp_path: Path
) -> None:
    here = output_place(Path(f"FILE://{tmp_path}/out"))
    assert here == tmp_path / "out" and output_place(Path("c:/out")) == Path("c:/out")
    shutil.copytree(local, there)
    names = [
        json.loads(ran("inspect", f"{out}/{SHARD}", "--json").stdout)["functions"]
        for out in (f"file://{local}", URL.replace("bucket", "Bucket"))
    ]
    assert names[0] == names[1]
    result = CliRunner().invoke(app, ["pull", "me/model", URL])
    assert f"{URL} is an address" in str(result.exception)


def test_a_key_is_never_beside_weights_of_another(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there.mkdir(parents=True)
    made = tmp_path / "made"
    made.mkdir()
    for folder, text in ((there, "old"), (made, "new")):
        for name in ("weights", "key"):
            (folder / name).write_text(text)
    bucket.befall("broken", "weights")
    with pytest.raises(UserError, match="weights cannot be written"):
        RemoteFolder(URL).replace_group(made, ["weights", "key"])
    assert not (there / "key").exists()
    bucket.befall()
    RemoteFolder(URL).replace_group(made, ["weights", "key"])
    assert {path.read_text() for path in there.iterdir()} == {"new"}


def test_a_file_that_was_sent_is_fetched_once_and_stays_while_it_is_open(
    there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there.mkdir(parents=True)
    files = []
    for number in range(6):  # more than anybody would keep by their count
        (there / f"{number}").write_text(f"{number}")
        files.append(SentFile(RemoteFolder(URL), f"{number}", sha256(there / f"{number}")))
    monkeypatch.setattr(remote_folder, "KEPT_SECONDS", 0)
    with ExitStack() as stack:
        here = [stack.enter_context(at_hand(file)) for file in files]
        shutil.rmtree(there)
        assert [path.read_text() for path in here] == [*"012345"]
        with at_hand(files[0]) as again:  # of another thread
            assert again == here[0]
        assert here[0].read_text() == "0"
        ends = [remote_folder._fetched[file] for file in files]
    for one in ends:
        one.end.join(10)
    assert not [path for path in here if path.parent.exists()]
    assert not remote_folder._fetched.keys() & {*files}


def test_names_that_lead_elsewhere_are_none(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("a/b", "../a", "a/../../b", "/a", "a//b", "a\\b", "")
    found = {f"some/out/{name}": {"size": 1} for name in names}
    monkeypatch.setattr(bucket.Bucket, "find", lambda *_, **__: found)
    assert RemoteFolder(URL).sizes() == {"a/b": 1}


def test_a_place_without_a_writer_is_one_line(checkpoint: Path, there: Path) -> None:
    pytest.importorskip("aiohttp")
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:1/out") as raised:
        convert(checkpoint, Path("http://127.0.0.1:1/out"), OPTIONS)
    assert "\n" not in str(raised.value)


@pytest.fixture
def s3(there: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """s3fs, and moto's server in the place of Amazon's."""
    pytest.importorskip("s3fs")
    servers = pytest.importorskip("moto.server")
    server = servers.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # clients of another test's server
    try:
        urlopen(f"{url}/moto-api/reset", data=b"").close()  # what that one held
        yield fsspec.filesystem("s3")
    finally:
        server.stop()


@pytest.mark.parametrize(
    "options, how",
    [
        pytest.param(replace(OPTIONS, layers=(0,), calibrate=None), {}, id="a layer"),
        pytest.param(OPTIONS, {"golden": True, "workers": 2}, id="all", marks=pytest.mark.slow),
    ],
)
def test_s3_takes_and_gives_it(
    checkpoint: Path, s3: Any, tmp_path: Path, options: ConvertOptions, how: dict[str, Any]
) -> None:
    url, here = "s3://some/out", tmp_path / "out"
    out = Path(url)
    with pytest.raises(UserError, match=r"s3://some/out\S* cannot be written"):
        convert(checkpoint, out, options)
    s3.mkdir("some")
    convert(checkpoint, out, options, **how)
    convert(checkpoint, here, options, **how)
    assert contents(fetched(url)) == contents(here)
    names = {path.removeprefix("some/out/") for path in s3.find("some/out")}
    assert names == {*read_manifest(here).files, FILE_NAME}
    assert not convert(checkpoint, out, options, **how).written
