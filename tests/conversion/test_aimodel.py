"""`convert --format aimodel`: the same conversion as for Core ML, computed by Core AI's runtime."""

import gc
import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from ane_moe.cli import main
from ane_moe.conversion.pipeline import convert
from ane_moe.conversion.plan import ConvertOptions
from ane_moe.errors import UserError
from ane_moe.forecast.core_ai import faults_of
from ane_moe.formats.recipe import FP16, find_recipe, recipe_of
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from ane_moe.manifest import read_manifest
from ane_moe.runtime import with_precision
from ane_moe.runtime.coreai.installed import PACKAGES
from ane_moe.runtime.reference.diff import Side, diff
from tests.slow_set import slow_but
from tests.verification.tiny import tiny_checkpoint

HAS_CORE_AI = importlib.util.find_spec("coreai_torch") is not None
needs_core_ai = pytest.mark.skipif(not HAS_CORE_AI, reason="Core AI's packages are not installed")
PROMPT = np.random.default_rng(0).integers(3, 61, 20).tolist()
COSINE = 0.9999


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four experts of a sparse layer, and a dense one."""
    return tiny_checkpoint(
        "qwen3_moe",
        tmp_path_factory.mktemp("checkpoint"),
        num_hidden_layers=2,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[1],
        intermediate_size=40,
        max_position_embeddings=1024,
    )


@pytest.fixture(scope="module")
def converted(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Conversions of it in both formats, each made once. Read only."""
    folder, made = tmp_path_factory.mktemp("conversions"), set()

    def out(form: str, compress: str = "fp16", golden: bool = False, **options) -> Path:
        facts = (form, compress, golden, *sorted(options.items()))
        path = folder / "-".join(map(str, facts)).replace("/", "_").replace(" ", "")
        if path not in made:
            shape = {"prefill": 16, "context": 64, "expert_tokens": (1, 16)} | options
            recipe = FP16 if compress == "fp16" else find_recipe(compress)
            chosen = ConvertOptions(recipe=recipe, format=form, **shape)
            convert(checkpoint, path, chosen, golden=golden)
            made.add(path)
        return path

    return out


def logits(out: Path, tokens: int = 6) -> tuple[list[int], np.ndarray]:
    """Greedy ids after the prompt, and the scores that they are of."""
    session = Session(load_shards(out))
    scores, ids = [session.prefill(PROMPT).copy()], []  # a session has one array for its scores
    for _ in range(tokens):
        ids.append(int(np.argmax(scores[-1])))
        scores.append(session.decode(ids[-1]).copy())
    return ids, np.array(scores, np.float64)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a.ravel() @ b.ravel() / np.linalg.norm(a) / np.linalg.norm(b))


@needs_core_ai
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"routing": "sparse"},
        *slow_but([], [{"state": "explicit"}, {"routing": "stream", "compress": "lut4"}]),
    ],
    ids=["mlstate", "sparse", "explicit", "stream"],
)
def test_both_formats_give_the_same_ids(converted: Callable[..., Path], options: dict) -> None:
    ours, theirs = (logits(converted(form, **options)) for form in ("mlpackage", "aimodel"))
    assert ours[0] == theirs[0]
    assert cosine(ours[1], theirs[1]) > COSINE


@needs_core_ai
@pytest.mark.parametrize("function", ["decode", "prefill"])
def test_what_is_between_is_the_same_under_the_same_names(
    converted: Callable[..., Path], function: str
) -> None:
    """What a template names, every layer that is stamped of it does."""
    ours, theirs = converted("mlpackage"), converted("aimodel")
    for part, least in (("attn/layer_01", 50), ("moe/layer_00", 60)):
        package, asset = ours / f"{part}.mlpackage", theirs / f"{part}.aimodel"
        result = diff(Side(package, function=function), Side(asset, "coreai", function))
        assert result.same and result.compared > least
        shown = {item.op for item in result.only}
        assert shown <= {"read_state", "reshape", "transpose"} and not result.unmatched_b


@needs_core_ai
def test_the_plan_is_the_same_but_for_the_names(converted: Callable[..., Path]) -> None:
    ours, theirs = (
        read_manifest(converted(form, routing="sparse")) for form in ("mlpackage", "aimodel")
    )
    named = [shard.path.replace(".mlpackage", ".aimodel") for shard in ours.shards]
    assert named == [shard.path for shard in theirs.shards]
    assert [shard.functions for shard in ours.shards] == [
        shard.functions for shard in theirs.shards
    ]
    assert theirs.versions["coreai-core"]


@needs_core_ai
def test_verify_passes_and_says_nothing_of_placement(
    converted: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Compressed, so that what is stored is read back for the golden of it."""
    out = converted("aimodel", "lut4", golden=True)
    for arguments, code in (
        (["verify", str(out), "--json"], 0),
        (["verify", str(out), "--compute-plan"], 2),
        (["verify", str(out), "--against", "coreai"], 2),
        (["verify", str(out), "--runtime", "reference"], 2),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        said = capsys.readouterr()
        assert ended.value.code == code, said
        if code == 0:
            document = json.loads(said.out)
            assert document["passed"] and document["runtime"] == "coreai"
            assert document["as_stored"] is not None
        else:
            assert len(said.err.strip().splitlines()) == 1


@needs_core_ai
def test_the_golden_of_what_is_stored_is_that_of_the_other_format(
    converted: Callable[..., Path],
) -> None:
    ours, theirs = (
        load_file(converted(form, "lut4", golden=True) / "golden_as_stored.safetensors")
        for form in ("mlpackage", "aimodel")
    )
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name])


@needs_core_ai
def test_a_conversion_goes_on_where_it_stopped(
    checkpoint: Path, converted: Callable[..., Path], tmp_path: Path
) -> None:
    whole = converted("aimodel")
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    (lost, *_) = [shard.path for shard in read_manifest(whole).packages]
    shutil.rmtree(out / lost)
    (out / "attn" / f".writing-{Path(lost).name}").mkdir()
    options = ConvertOptions(
        recipe=FP16, format="aimodel", prefill=16, context=64, expert_tokens=(1, 16)
    )
    report = convert(checkpoint, out, options)
    assert report.written == (lost,)
    for path in sorted(path for path in whole.rglob("*") if path.is_file()):
        assert path.read_bytes() == (out / path.relative_to(whole)).read_bytes()
    assert len([*out.rglob("*")]) == len([*whole.rglob("*")])


@needs_core_ai
@pytest.mark.parametrize("damage", ["flipped", "truncated", "version", "metadata"])
def test_a_damaged_shard_is_found_and_is_one_line(
    converted: Callable[..., Path],
    tmp_path: Path,
    damage: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = Path(shutil.copytree(converted("aimodel"), tmp_path / "out"))
    shard = out / read_manifest(out).packages[0].path
    program, metadata = shard / "main.mlirb", shard / "metadata.json"
    content = program.read_bytes()
    if damage == "flipped":
        program.write_bytes(bytes([*content[:-9], content[-9] ^ 1, *content[-8:]]))
    elif damage == "truncated":
        program.write_bytes(content[:100])
    else:
        version = '"9.9"' if damage == "version" else "2.0"
        metadata.write_text(f'{{"assetVersion": {version}' + ("}" if damage == "version" else ""))
    with pytest.raises(SystemExit) as ended:
        main(["generate", str(out), "--prompt-ids", "3,4", "--max-tokens", "1"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "make it again" in line


@needs_core_ai
def test_commands_read_an_asset(
    converted: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = converted("mlpackage"), converted("aimodel")
    shard = "attn/layer_00"
    a, b = str(ours / f"{shard}.mlpackage"), str(theirs / f"{shard}.aimodel")
    said = {}
    for name, arguments in {
        "run": ["run", b, "--function", "decode", "--seed", "0", "--json"],
        "diff": ["diff", a, b, "--function", "prefill", "--precision", "fp16", "--json"],
        "inspect": ["inspect", b, "--json"],
    }.items():
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
        said[name] = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in said["run"]["outputs"]] == ["y"]
    assert said["diff"]["same"] and said["diff"]["outputs"]
    functions = said["inspect"]["functions"]
    assert [one["name"] for one in functions] == ["decode", "prefill"]
    assert [name for name, _ in functions[0]["states"]] == ["k_cache", "v_cache"]


def generated(out: Path, tokens: int) -> list[tuple[int, int, int]]:
    """A session of so many tokens, four times: open files, files of Core AI's, and bytes in memory
    after each quarter."""
    session, found = Session(load_shards(out)), []
    scores = session.prefill(PROMPT)
    for _ in range(4):
        for _ in range(tokens // 4):
            scores = session.decode(int(np.argmax(scores)))
        process = psutil.Process()
        files = sum(1 for path in Path(tempfile.gettempdir()).rglob("*") if path.is_file())
        found.append((process.num_fds(), files, process.memory_info().rss))
    return found


def leaks(out: Path, folder: Path, tokens: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that memory grew by after the first quarter. Files are none of them left."""
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    found = generated(out, tokens)
    assert len({files for files, _, _ in found}) == 1
    assert len({kept for _, kept, _ in found}) == 1 and found[0][1] > 0
    gc.collect()
    assert not list(folder.iterdir())
    return found[-1][2] - found[0][2]


@needs_core_ai
def test_a_session_leaves_no_files(
    converted: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaks(converted("aimodel"), tmp_path, 20, monkeypatch)


@needs_core_ai
@pytest.mark.slow
def test_500_tokens_leak_neither_memory_nor_files(
    converted: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even a hundred bytes of each of seven calls a token."""
    out = converted("aimodel", context=576)
    assert leaks(out, tmp_path, 500, monkeypatch) < 375 * 7 * 100


def test_without_the_packages_nothing_is_begun(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(checkpoint), str(tmp_path / "out"), "--format", "aimodel"])
    assert ended.value.code == 2
    assert "pip install 'ane-moe[coreai]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@needs_core_ai
@pytest.mark.parametrize("command", ["generate", "inspect", "run", "diff", "against"])
def test_without_the_packages_each_command_gives_one_line(
    command: str, converted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    out, packages = converted("aimodel"), converted("mlpackage")
    shard = str(out / read_manifest(out).packages[0].path)
    arguments = {
        "generate": ["generate", str(out), "--prompt-ids", "3,4"],
        "inspect": ["inspect", shard],
        "run": ["run", shard, "--seed", "0"],
        "diff": ["diff", shard, shard],
        "against": ["verify", str(packages), "--against", "coreai"],
    }
    for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as ended:
        main(arguments[command])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "pip install 'ane-moe[coreai]'" in line


@needs_core_ai
def test_formats_that_a_budget_chose_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    how = ["--format", "aimodel", "--budget-mb", "1.7", "--prefill", "0", "--workers", "1"]
    with pytest.raises(SystemExit) as ended:
        main(["convert", "demo", str(out), *how])
    assert ended.value.code == 0
    chosen = recipe_of(read_manifest(out).weights, read_manifest(out).recipe).formats
    faults, said = faults_of(chosen), capsys.readouterr().err.splitlines()
    assert faults and set(faults) <= set(said)


@pytest.mark.parametrize("runtime", ["auto", "coreai"])
def test_another_precision_is_not_core_ais(runtime: str) -> None:
    with pytest.raises(UserError, match="found: coreai; leave --precision out"):
        with_precision(runtime, "fp16", "a.aimodel")


@pytest.mark.parametrize("given", [["--target", "m4-max"], ["--os", "27"], ["--allow-cpu"]])
def test_placement_rules_are_core_mls(
    checkpoint: Path, tmp_path: Path, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(checkpoint), out, "--format", "aimodel", *given])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"leave {given[0]} out" in line


def test_a_benchmark_of_assets_says_which_core_ai_it_was(converted: Callable[..., Path]) -> None:
    from ane_moe.benchmark.surroundings import surroundings

    manifest = read_manifest(converted("mlpackage"))
    by_runtime = [surroundings(manifest, name, None, 0, None) for name in ("coreai", "reference")]
    versions, others = (conditions.versions for conditions in by_runtime)
    assert versions.keys() - others.keys() == {"coreai-core", "coreai-torch"}
