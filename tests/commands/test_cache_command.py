"""`ane-moe cache` from the command line."""

import json
import re
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from ane_moe.commands.cache import cache
from ane_moe.errors import UserError
from ane_moe.runtime.coreml.modelc_cache import ModelCache

BUILD = "24F74"
MAC = SimpleNamespace(platform="darwin")  # to the command alone


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache of two models of 1 MB, the second known to be good for decode."""
    monkeypatch.setattr("ane_moe.runtime.coreml.modelc_cache.current_os_build", lambda: BUILD)
    monkeypatch.setattr("ane_moe.commands.cache.sys", MAC)
    store = ModelCache(tmp_path / "cache")
    for name in ("first", "second"):
        package = tmp_path / f"{name}.mlpackage"
        package.mkdir()
        (package / "weight.bin").write_text(name)
        store.get(package, store.key(package), compile_to)
    store.mark_good(store.key(package), "decode-cpu_and_ne")
    return tmp_path / "cache"


def compile_to(destination):
    destination.mkdir()
    (destination / "weight.bin").write_bytes(b"\0" * 10**6)


def run(folder, *arguments):
    app = typer.Typer()
    app.command()(cache)
    return CliRunner().invoke(
        app, ["--folder", str(folder), *map(str, arguments)], env={"COLUMNS": "200"}
    )


def test_it_shows_each_model_its_size_and_state_and_the_limit(folder):
    result = run(folder)
    assert result.exit_code == 0
    assert re.search(
        r"first\.mlpackage +0\.00 GB +\d{4}-\d\d-\d\d \d\d:\d\d +untried", result.stdout
    )
    assert re.search(r"second\.mlpackage .*good for decode-cpu_and_ne", result.stdout)
    assert "2 compiled models, 0.00 GB of at most 32.0 GB" in result.stdout


def test_json_is_one_document_with_units_in_its_names(folder):
    document = json.loads(run(folder, "--json").stdout)
    assert document["size_bytes"] == 2 * 10**6 and document["limit_bytes"] == 32 * 10**9
    assert document["os_build"] == BUILD and document["removed"] == []
    assert [set(entry) for entry in document["entries"]] == [
        {"package", "key", "os_build", "size_bytes", "last_used_unix_seconds", "in_use", "good"}
    ] * 2


def test_clear_removes_everything_and_says_how_much(folder):
    result = run(folder, "--clear")
    assert result.exit_code == 0 and "removed 2 compiled models" in result.stderr
    assert "0 compiled models" in result.stdout
    assert len(json.loads(run(folder, "--clear", "--json").stdout)["removed"]) == 0


def test_a_limit_is_kept_at_once_and_stays(folder):
    document = json.loads(run(folder, "--limit-gb", 0.0015, "--json").stdout)
    assert len(document["entries"]) == 1 and len(document["removed"]) == 1
    assert json.loads(run(folder, "--json").stdout)["limit_bytes"] == 1_500_000


def test_a_negative_limit_is_a_usage_error(folder):
    assert run(folder, "--limit-gb", -1).exit_code == 2


def test_without_a_build_of_macos_it_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr("ane_moe.commands.cache.sys", MAC)
    monkeypatch.setenv("PATH", str(tmp_path))
    result = run(tmp_path / "cache")
    assert isinstance(result.exception, UserError) and "macOS" in str(result.exception)


def test_another_folder_is_shown_off_macos_without_compiled_models(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    shown = json.loads(run(tmp_path, "--json").stdout)
    assert shown.keys() == {"templates", "fetched"}
    assert shown["fetched"]["folder"] == str(tmp_path) and not [*tmp_path.iterdir()]


def test_templates_are_shown_and_cleared_on_any_system(monkeypatch, tmp_path):
    monkeypatch.setenv("ANE_MOE_CACHE", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "x.template").write_bytes(b"\0" * 10**6)
    app = typer.Typer()
    app.command()(cache)
    shown = CliRunner().invoke(app, [])
    assert shown.exit_code == 0 and "1 templates of conversions, 1.0 MB" in shown.stdout
    cleared = json.loads(CliRunner().invoke(app, ["--clear", "--json"]).stdout)["templates"]
    assert (cleared["count"], cleared["removed"]) == (0, 1)
    assert isinstance(CliRunner().invoke(app, ["--limit-gb", "1"]).exception, UserError)
