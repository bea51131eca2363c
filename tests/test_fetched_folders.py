"""What was fetched is listed by where it is from, and removed: that, and nothing beside it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ane_moe.addresses import ADDRESS_FILE, kept_as
from ane_moe.cli import app
from ane_moe.errors import UserError
from ane_moe.fetch_lock import FETCHING, if_free, lock_of
from ane_moe.fetched_folders import FetchedFolder, fetched_folders, of_origin, remove
from ane_moe.files import TEMPORARY
from ane_moe.manifest import FILE_NAME

ONE, OTHER = "s3://bucket/out", "s3://bucket/out2"
COMMIT = "c0ffee" * 6 + "0123"
AT = f"hf://me/a--b@{COMMIT}"
K1, K2 = kept_as(ONE), kept_as(OTHER)
CONVERSION, LAYERS = f"conversions/me--a--b/{COMMIT}", f"hub/me--a--b/{COMMIT}/layers_1_3"
FOREIGN = (  # of people, and of the Hub's own cache where it has the same folder as ours
    "templates/x--y/z",
    "remote/backup",
    f"remote/{K2}",  # without an address
    "conversions/addresses/of-friends",
    "conversions/my--model/final",
    f"conversions/my--model/{COMMIT}",  # without a manifest
    f"hub/models--me--a/snapshots/{COMMIT}",
    "hub/models--me--a/blobs/headers",
    f"hub/models--me--a/{COMMIT}/headers",
    f"hub/datasets--me--a/{COMMIT}/layers_1",
    f"hub/my--model/{COMMIT}/weights",
    "hub/my--model/main/headers",
)
# A process that fetches into a folder, says so, and ends when it is told to.
FETCHES = """
import sys
from pathlib import Path
from ane_moe.fetch_lock import one_run

with one_run(Path(sys.argv[1])):
    pass
print("fetched", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """One folder of each kind, as they are fetched, and what is none."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("ANE_MOE_CACHE", str(cache))
    for name, url in (
        (f"conversions/addresses/{K1}", ONE),
        (f"conversions/addresses/{K2}", OTHER),
        (CONVERSION, ""),
        (f"remote/{K1}", ONE),
        (LAYERS, ""),
        *((name, "") for name in FOREIGN),
    ):
        (cache / name / "inside").mkdir(parents=True)
        (cache / name / "inside" / "file").write_bytes(b"a" * 5000)
        if url:
            (cache / name / ADDRESS_FILE).write_text(url)
    (cache / CONVERSION / FILE_NAME).write_text("{}")
    with (cache / f"remote/{K1}/holes").open("wb") as file:
        file.truncate(1 << 40)
    yield cache
    assert all((cache / name / "inside" / "file").is_file() for name in FOREIGN)


def facts(found: list[FetchedFolder]) -> set[tuple[str, str]]:
    return {(one.origin, one.holds) for one in found}


def test_they_are_called_by_where_they_are_from(cache: Path) -> None:
    found = fetched_folders(cache)
    assert facts(found) == {
        (ONE, "conversion"),
        (OTHER, "conversion"),
        (AT, "conversion"),
        (ONE, "headers"),
        (AT, "layers 1 3"),
    }
    assert all(5000 <= one.size_bytes < 100_000 for one in found)  # on the disk: holes are none
    assert facts(of_origin("s3:/bucket/out/", cache)) == {(ONE, "conversion"), (ONE, "headers")}
    for name in ("me/a--b", "hf://me/a--b", f"me/a--b@{COMMIT}", AT):
        assert facts(of_origin(name, cache)) == {(AT, "conversion"), (AT, "layers 1 3")}, name
    for name in ("", "/", "hf://", "s3://bucket", "s3://bucket/ou", "me/a", "..", str(cache)):
        with pytest.raises(UserError, match="is kept; found: 5 others"):
            of_origin(name, cache)


def test_links_are_neither_listed_nor_followed(cache: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "me--c" / COMMIT).mkdir(parents=True)
    (elsewhere / "me--c" / COMMIT / FILE_NAME).write_text("{}")
    (elsewhere / "mine").write_text("mine")
    (elsewhere / ADDRESS_FILE).write_text("s3://bucket/linked")
    (cache / "conversions" / "addresses" / kept_as("s3://bucket/linked")).symlink_to(elsewhere)
    (cache / "conversions" / "me--c").symlink_to(elsewhere / "me--c")
    (cache / "remote" / K1 / "link").symlink_to(elsewhere)
    found = fetched_folders(cache)
    assert len(found) == 5
    (cache / "hub").rename(tmp_path / "moved")
    (cache / "hub").symlink_to(tmp_path / "moved")  # after they were listed
    assert len(remove(found, cache)) == 4 and not fetched_folders(cache)
    assert (elsewhere / "mine").read_text() == "mine" and (elsewhere / "me--c" / COMMIT).is_dir()
    assert (tmp_path / "moved" / LAYERS.removeprefix("hub/") / "inside" / "file").is_file()


def test_the_command_removes_what_is_named_and_what_no_run_fetches(cache: Path) -> None:
    mark = cache / "checked" / "0"
    mark.parent.mkdir()
    mark.write_text(f"{cache}/conversions/addresses/{K1}/digest\n")
    (mark.parent / "1").write_text(f"{cache}/conversions/addresses/{K2}/digest\n")
    with if_free(cache / "remote" / K1, cache):  # as who fetches there
        result = CliRunner().invoke(app, ["cache", "--remove", ONE])
    assert isinstance(result.exception, UserError)
    assert f"{ONE} not removed; found: another run fetches, uses or removes it" in str(
        result.exception
    )
    assert "removed 1 fetched folders" in result.stderr and ONE in result.stdout
    assert [path.name for path in mark.parent.iterdir()] == ["1"]
    done = json.loads(CliRunner().invoke(app, ["cache", "--remove", ONE, "--json"]).stdout)
    assert [one["address"] for one in done["fetched"]["removed"]] == [ONE]
    assert {one["address"] for one in done["fetched"]["entries"]} == {OTHER, AT}
    told = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)["fetched"]
    assert told["count"] == 3 and told["size_bytes"] == done["fetched"]["size_bytes"]
    assert CliRunner().invoke(app, ["cache", "--remove-all"]).exit_code == 0
    assert not fetched_folders(cache)


def test_a_removal_that_was_killed_is_ended_by_the_next(cache: Path) -> None:
    for folder in (cache / "conversions/addresses" / K1, cache / CONVERSION):
        folder.rename(folder.with_name(f"{TEMPORARY}{folder.name}"))
    assert facts(fetched_folders(cache)) >= {(ONE, "conversion"), (AT, "conversion")}
    for name in (ONE, AT):
        assert len(remove(of_origin(name, cache), cache)) == 2
    assert facts(fetched_folders(cache)) == {(OTHER, "conversion")}


def test_names_are_those_that_other_commands_know(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    branch = tmp_path / "models--me--a--b" / "refs" / "main"
    branch.parent.mkdir(parents=True)
    branch.write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    below = cache / "remote" / kept_as(f"{AT}/sub")
    below.mkdir()
    (below / ADDRESS_FILE).write_text(f"{AT}/sub")
    of_address = {(ONE, "conversion"), (ONE, "headers")}
    of_model = {(AT, "conversion"), (AT, "layers 1 3")}
    file_below = {(f"{AT}/sub", "headers")}
    for name, meant in {
        f"{ONE}/x.gguf": of_address,
        "hf://me/a--b/x.gguf": of_model,
        "HF:/me/a--b@main/x.gguf": of_model,
        f"{AT}/sub/x.gguf": file_below,
        f"{AT}/sub": file_below,
        "me/a--b:Q4_K_M": of_model | file_below,
        "me/a--b@main": of_model | file_below,
        "hf://me/a--b@main:Q8_0/": of_model | file_below,
    }.items():
        assert facts(of_origin(name, cache)) == meant, name
    for name in ("me/a--b@v1", "hf://me/a--b/other/x.gguf", f"me/a--b@{COMMIT[:-1]}4"):
        with pytest.raises(UserError, match=f"is kept; found: {AT}, {AT}/sub; `ane-moe cache`"):
            of_origin(name, cache)


def test_what_a_living_process_has_fetched_is_not_removed(cache: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(cache)  # another spelling of the same cache
    process = subprocess.Popen(
        [sys.executable, "-c", FETCHES, str(link / "remote" / K1)],
        env={**os.environ, "ANE_MOE_CACHE": str(link)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout and process.stdout.readline() == "fetched\n"
        assert facts(remove(of_origin(ONE, cache), cache)) == {(ONE, "conversion")}
        assert process.poll() is None and facts(of_origin(ONE, link)) == {(ONE, "headers")}
        process.communicate("end")
    assert facts(remove(of_origin(ONE, cache), cache)) == {(ONE, "headers")}


def test_a_lock_is_the_same_however_a_folder_is_spelled(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(cache)
    monkeypatch.chdir(tmp_path)
    roots = (cache, tmp_path / "link", Path("link"), Path("cache"), cache / "hub" / "..")
    locks = {lock_of(root / LAYERS, root).resolve() for root in roots}
    locks.add(lock_of(cache / LAYERS, Path("link")).resolve())
    aside = (cache / LAYERS).with_name(f"{TEMPORARY}layers_1_3")
    assert locks == {lock_of(aside, cache)} and locks.pop().parent == cache / FETCHING
    others = {lock_of(cache / name, cache) for name in (LAYERS, CONVERSION, "hub", ".")}
    assert len(others | {lock_of(tmp_path, cache), lock_of(Path("/"), cache)}) == 6


def test_of_two_removals_at_once_one_does_the_work(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, delete, by_other = fetched_folders(cache), shutil.rmtree, []

    def meanwhile(folder: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:  # it has been set aside
            with monkeypatch.context() as other:
                other.setattr("ane_moe.fetched_folders.shutil.rmtree", delete)
                left = [one for one in fetched_folders(cache) if one.folder == folder]
                assert len(left) == 1 and not remove(left, cache)
                by_other.extend(remove([one for one in before if gone(one)], cache))
        delete(folder, ignore_errors=ignore_errors)

    def gone(one: FetchedFolder) -> bool:
        return not one.folder.exists()

    monkeypatch.setattr("ane_moe.fetched_folders.shutil.rmtree", meanwhile)
    assert remove(before, cache) == before and not fetched_folders(cache)
    assert len(by_other) == 1 + 2 + 3 + 4 + 5  # each is gone for the other one, too
    assert remove(before, cache) == before
