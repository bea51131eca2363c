"""What was fetched is listed by where it is from, and removed: that, and nothing beside it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ane_moe.addresses import ADDRESS_FILE
from ane_moe.cli import app
from ane_moe.errors import UserError
from ane_moe.fetch_lock import one_run
from ane_moe.fetched_folders import FetchedFolder, fetched_folders, of_origin, remove
from ane_moe.files import TEMPORARY

ONE, OTHER = "s3://bucket/out", "s3://bucket/out2"
AT = "hf://me/a--b@c0ffee"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One folder of each kind, as they are fetched, and what is none."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("ANE_MOE_CACHE", str(cache))
    for name, url in (
        ("conversions/addresses/k1", ONE),
        ("conversions/addresses/k2", OTHER),
        ("conversions/me--a--b/c0ffee", ""),
        ("remote/k3", ONE),
        ("hub/me--a--b/c0ffee/layers_1_3", ""),
        ("templates/x--y/z", ""),
    ):
        (cache / name / "inside").mkdir(parents=True)
        (cache / name / "inside" / "file").write_bytes(b"a" * 5000)
        if url:
            (cache / name / ADDRESS_FILE).write_text(url)
    with (cache / "remote/k3/holes").open("wb") as file:
        file.truncate(1 << 40)
    return cache


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
    for name in ("me/a--b", "hf://me/a--b", "me/a--b@c0ffee", AT):
        assert facts(of_origin(name, cache)) == {(AT, "conversion"), (AT, "layers 1 3")}, name
    for name in ("", "/", "hf://", "s3://bucket", "s3://bucket/ou", "me/a", "..", str(cache)):
        with pytest.raises(UserError, match="is kept; found: 5 others"):
            of_origin(name, cache)


def test_links_are_neither_listed_nor_followed(cache: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "me--c" / "f00").mkdir(parents=True)
    (elsewhere / "mine").write_text("mine")
    (cache / "conversions" / "addresses" / "link").symlink_to(elsewhere)
    (cache / "conversions" / "me--c").symlink_to(elsewhere / "me--c")
    (cache / "remote" / "k3" / "link").symlink_to(elsewhere)
    found = fetched_folders(cache)
    assert len(found) == 5
    (cache / "hub").rename(tmp_path / "moved")
    (cache / "hub").symlink_to(tmp_path / "moved")  # after they were listed
    assert len(remove(found, cache)) == 4 and not fetched_folders(cache)
    assert (elsewhere / "mine").read_text() == "mine" and (elsewhere / "me--c" / "f00").is_dir()
    assert (tmp_path / "moved/me--a--b/c0ffee/layers_1_3/inside/file").is_file()
    assert (cache / "templates/x--y/z/inside/file").is_file()


def test_the_command_removes_what_is_named_and_what_no_run_fetches(cache: Path) -> None:
    mark = cache / "checked" / "0"
    mark.parent.mkdir()
    mark.write_text(f"{cache}/conversions/addresses/k1/digest\n")
    (mark.parent / "1").write_text(f"{cache}/conversions/addresses/k2/digest\n")
    with one_run(cache / "remote" / "k3"):
        result = CliRunner().invoke(app, ["cache", "--remove", ONE])
    assert isinstance(result.exception, UserError)
    assert f"{ONE} not removed; found: another run fetches there" in str(result.exception)
    assert "removed 1 fetched folders" in result.stderr and ONE in result.stdout
    assert [path.name for path in mark.parent.iterdir()] == ["1"]
    done = json.loads(CliRunner().invoke(app, ["cache", "--remove", ONE, "--json"]).stdout)
    assert [one["address"] for one in done["fetched"]["removed"]] == [ONE]
    assert {one["address"] for one in done["fetched"]["entries"]} == {OTHER, AT}
    told = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)["fetched"]
    assert told["count"] == 3 and told["size_bytes"] == done["fetched"]["size_bytes"]
    assert CliRunner().invoke(app, ["cache", "--remove-all"]).exit_code == 0
    assert not fetched_folders(cache) and (cache / "templates/x--y/z/inside/file").is_file()


def test_a_removal_that_was_killed_is_ended_by_the_next(cache: Path) -> None:
    for folder in (cache / "conversions/addresses/k1", cache / "conversions/me--a--b/c0ffee"):
        folder.rename(folder.with_name(f"{TEMPORARY}{folder.name}"))
    assert facts(fetched_folders(cache)) >= {(ONE, "conversion"), (AT, "conversion")}
    for name in (ONE, AT):
        assert len(remove(of_origin(name, cache), cache)) == 2
    assert facts(fetched_folders(cache)) == {(OTHER, "conversion")}
