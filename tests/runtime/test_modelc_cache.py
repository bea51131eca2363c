"""The cache of compiled models, with a compiler that copies."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ane_moe.errors import UserError
from ane_moe.runtime.coreml.modelc_cache import PLANS, ModelCache

BUILD = "24F74"
SIZE = 1000


def make_package(folder: Path, name: str = "net", text: str = "weights") -> Path:
    path = folder / f"{name}.mlpackage"
    path.mkdir(parents=True, exist_ok=True)
    (path / "Manifest.json").write_text("{}")
    (path / "weight.bin").write_text(text)
    return path


def compile_to(destination: Path) -> None:
    destination.mkdir()
    (destination / "model.mil").write_bytes(b"m" * SIZE)
    (destination / "weights").mkdir()
    (destination / "weights" / "weight.bin").touch()


def forbidden(destination: Path) -> None:
    raise AssertionError("compiled again")


def open_cache(folder: Path, **options) -> ModelCache:
    return ModelCache(folder, **{"os_build": BUILD, **options})


def fill(folder: Path, packages: Path, names: str) -> dict[str, str]:
    """Entries made by a cache that is gone; the first of `names` was used last."""
    cache, keys = open_cache(folder), {}
    for age, name in enumerate(names):
        package = make_package(packages, name, name)
        keys[name] = cache.key(package)
        used = cache.get(package, keys[name], compile_to).parent / "entry.json"
        os.utime(used, (time.time() - age - 1,) * 2)
    return keys


def names(entries) -> str:
    return "".join(sorted(entry.name.removesuffix(".mlpackage") for entry in entries))


def test_a_package_is_compiled_once_and_found_afterwards(tmp_path):
    package, cache = make_package(tmp_path), open_cache(tmp_path / "cache")
    key = cache.key(package)
    assert cache.find(key) is None
    first = cache.get(package, key, compile_to)
    assert first.suffix == ".mlmodelc" and (first / "model.mil").read_bytes() == b"m" * SIZE
    assert cache.get(package, key, forbidden) == first == open_cache(tmp_path / "cache").find(key)


def test_the_key_follows_content_and_os_build_and_not_the_place(tmp_path):
    cache = open_cache(tmp_path / "cache")
    key = cache.key(make_package(tmp_path / "a"))
    assert cache.key(make_package(tmp_path / "b", "other")) == key
    assert cache.key(make_package(tmp_path / "c", text="Weights")) != key
    assert open_cache(tmp_path / "cache", os_build="25A1").key(make_package(tmp_path / "a")) != key
    renamed = make_package(tmp_path / "d")
    (renamed / "weight.bin").rename(renamed / "weights.bin")
    assert cache.key(renamed) != key


@settings(deadline=None, max_examples=30)
@given(
    before=st.binary(min_size=1, max_size=8),
    after=st.binary(min_size=1, max_size=8),
    settled=st.booleans(),
)
def test_a_remembered_hash_never_outlives_the_content_it_was_of(
    tmp_path_factory, before, after, settled
):
    folder = tmp_path_factory.mktemp("hash")
    package, cache = make_package(folder), open_cache(folder / "cache")
    weights = package / "weight.bin"
    old = time.time() - 3600
    for content in (before, after):
        weights.write_bytes(content)
        if settled:  # and given back its old times, as copying tools do
            for path in package.iterdir():
                os.utime(path, (old, old))
        remembered = cache.key(package)
        assert remembered == open_cache(folder / f"fresh-{content.hex()}").key(package)


def test_an_unchanged_package_is_not_read_twice(tmp_path, monkeypatch):
    package = make_package(tmp_path)
    for path in package.iterdir():
        os.utime(path, (1, 1))
    key = open_cache(tmp_path / "cache").key(package)
    monkeypatch.setattr("ane_moe.runtime.coreml.modelc_cache._content_hash", forbidden)
    assert open_cache(tmp_path / "cache").key(package) == key


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: (entry / "entry.json").unlink(),
        lambda entry: (entry / "entry.json").write_text('{"format": 1, "files'),
        lambda entry: (entry / "entry.json").write_text("[]"),
        lambda entry: (entry / "entry.json").write_text("{}"),
        lambda entry: (entry / "model.mlmodelc" / "model.mil").write_bytes(b"m" * (SIZE - 1)),
        lambda entry: (entry / "model.mlmodelc" / "weights" / "weight.bin").unlink(),
        lambda entry: shutil.rmtree(entry / "model.mlmodelc"),
        lambda entry: (entry / "good").rmdir(),
    ],
    ids=[
        "no entry.json",
        "half an entry.json",
        "a list",
        "no fields",
        "a short file",
        "a lost file",
        "no model",
        "no good",
    ],
)
def test_a_damaged_entry_is_compiled_again(tmp_path, damage):
    package, cache = make_package(tmp_path), open_cache(tmp_path / "cache")
    key = cache.key(package)
    damage(cache.get(package, key, compile_to).parent)
    assert open_cache(tmp_path / "cache").find(key) is None
    assert (cache.get(package, key, compile_to) / "model.mil").stat().st_size == SIZE


def test_a_failed_compilation_leaves_nothing(tmp_path):
    package, cache = make_package(tmp_path), open_cache(tmp_path / "cache")

    def half(destination: Path) -> None:
        compile_to(destination)
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        cache.get(package, cache.key(package), half)
    assert cache.entries() == [] and not list((tmp_path / "cache" / "work").iterdir())


def test_a_full_disk_is_an_error_that_says_what_to_do(tmp_path):
    package, cache = make_package(tmp_path), open_cache(tmp_path / "cache")

    def full(destination: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"No space left.*--clear"):
        cache.get(package, cache.key(package), full)


def test_leavings_of_a_process_that_died_while_compiling_go_when_they_are_old(tmp_path):
    cache = open_cache(tmp_path / "cache")
    old, new = (tmp_path / "cache" / "work" / name for name in ("old", "new"))
    for folder in (old, new):
        compile_to(folder)
    os.utime(old, (1, 1))
    cache.trim()
    assert not old.exists() and new.exists()


def test_over_the_limit_the_least_recently_used_entries_go(tmp_path):
    keys = fill(tmp_path / "cache", tmp_path, "abcd")
    cache = open_cache(tmp_path / "cache", limit_bytes=2 * SIZE + 1)
    assert names(cache.trim()) == "cd" and names(cache.entries()) == "ab"
    assert cache.find(keys["c"]) is None


def test_finding_an_entry_makes_it_the_last_used(tmp_path):
    keys = fill(tmp_path / "cache", tmp_path, "abc")
    open_cache(tmp_path / "cache").find(keys["c"])
    assert names(open_cache(tmp_path / "cache", limit_bytes=SIZE).trim()) == "ab"


def test_a_new_entry_pushes_out_old_ones_and_stays_though_it_is_over_the_limit(tmp_path):
    fill(tmp_path / "cache", tmp_path, "ab")
    cache = open_cache(tmp_path / "cache", limit_bytes=SIZE // 2)
    package = make_package(tmp_path, "new", "new")
    assert cache.get(package, cache.key(package), compile_to).exists()
    assert names(cache.entries()) == "new" and cache.entries()[0].in_use


def test_an_entry_that_a_living_process_has_loaded_is_not_removed(tmp_path):
    keys = fill(tmp_path / "cache", tmp_path, "ab")
    code = (
        "import sys; from pathlib import Path; from ane_moe.runtime.coreml.modelc_cache import "
        "ModelCache\n"
        f"cache = ModelCache(Path(sys.argv[1]), os_build={BUILD!r}); cache.find(sys.argv[2])\n"
        "print('loaded', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "cache", keys["a"]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout.readline() == b"loaded\n"
    cache = open_cache(tmp_path / "cache", limit_bytes=0)
    assert names(cache.trim()) == "b" and names(cache.clear()) == ""
    assert [entry.in_use for entry in cache.entries()] == [True]
    holder.kill()  # no clean-up of its own
    holder.communicate()
    assert names(cache.clear()) == "a" and cache.entries() == []


def test_clearing_removes_the_kept_compute_plans_too(tmp_path):
    fill(tmp_path / "cache", tmp_path, "a")
    plan = tmp_path / "cache" / PLANS / "plan.json"
    plan.parent.mkdir()
    plan.touch()
    assert names(open_cache(tmp_path / "cache").clear()) == "a" and not plan.parent.exists()


def test_entries_of_another_os_build_go_first(tmp_path):
    fill(tmp_path / "cache", tmp_path, "ab")
    newer = open_cache(tmp_path / "cache", os_build="25A1")
    package = make_package(tmp_path, "new", "new")
    newer.get(package, newer.key(package), compile_to)
    assert names(newer.entries()) == "new"


def test_the_limit_is_remembered_by_the_folder(tmp_path):
    fill(tmp_path / "cache", tmp_path, "abc")
    assert names(open_cache(tmp_path / "cache").set_limit(SIZE)) == "bc"
    assert open_cache(tmp_path / "cache").limit_bytes == SIZE
    (tmp_path / "cache" / "settings.json").write_text("nonsense")
    assert open_cache(tmp_path / "cache").limit_bytes > SIZE


def test_what_is_known_to_be_good_goes_with_the_entry(tmp_path):
    package, cache = make_package(tmp_path), open_cache(tmp_path / "cache")
    key = cache.key(package)
    cache.get(package, key, compile_to)
    cache.mark_good(key, "decode-cpu_and_ne")
    cache.mark_good(key, "../../outside")
    assert cache.is_good(key, "decode-cpu_and_ne") and cache.is_good(key, "../../outside")
    assert (
        not cache.is_good(key, "prefill-cpu_and_ne")
        and not (cache.folder.parent / "outside").exists()
    )
    cache.discard(key)
    assert not cache.is_good(key, "decode-cpu_and_ne")


def _race(folder: Path, barrier, log: Path) -> None:
    cache = open_cache(folder / "cache")
    package = folder / "net.mlpackage"

    def slowly(destination: Path) -> None:
        with open(log, "a") as stream:
            stream.write("compiled\n")
        compile_to(destination)
        time.sleep(0.2)

    barrier.wait()
    model = cache.get(package, cache.key(package), slowly)
    assert (model / "model.mil").stat().st_size == SIZE


def test_of_processes_that_race_for_a_package_one_compiles_and_all_get_it(tmp_path):
    make_package(tmp_path)
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    racers = [
        context.Process(target=_race, args=(tmp_path, barrier, tmp_path / "log")) for _ in range(4)
    ]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert [racer.exitcode for racer in racers] == [0] * 4
    assert (tmp_path / "log").read_text() == "compiled\n"
    cache = open_cache(tmp_path / "cache")
    assert len(cache.entries()) == 1 and not list((cache.folder / "work").iterdir())


def test_a_folder_that_cannot_be_made_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/cache cannot be used"):
        open_cache(tmp_path / "file" / "cache")


def test_off_macos_the_cache_says_that_it_has_no_build(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"macOS build.*--runtime reference"):
        ModelCache(tmp_path / "cache")


def test_entry_json_names_the_package_and_its_files(tmp_path):
    package, cache = make_package(tmp_path), open_cache(tmp_path / "cache")
    about = json.loads(
        (cache.get(package, cache.key(package), compile_to).parent / "entry.json").read_text()
    )
    assert (
        about["name"] == "net.mlpackage"
        and about["os_build"] == BUILD
        and about["size_bytes"] == SIZE
    )
    assert about["files"] == {"model.mil": SIZE, "weights/weight.bin": 0}
