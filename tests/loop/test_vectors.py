"""Test vectors, and the rules of docs/hosts.md: a host that knows nothing else makes the same."""

import ast
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from ane_moe.cli import app
from ane_moe.conversion.pipeline import convert
from ane_moe.conversion.plan import ConvertOptions
from ane_moe.demo import demo_checkpoint, privacy_checkpoint
from ane_moe.errors import UserError
from ane_moe.files import sha256
from ane_moe.formats.recipe import FP16
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from ane_moe.loop.vectors import INDEX, TENSORS, write_vectors
from tests.early import drawn_file
from tests.loop import plain_host
from tests.loop.plain_host import Host
from tests.models import make_model, save_checkpoint
from tests.slow_set import slow_but
from tests.verification.tiny import tiny_conversion

# What a conversion has that a host has to know of.
CONVERSIONS = {
    "masked": ("demo", {"context": 64, "prefill": 8}),
    "sparse, explicit states, [1,C,T,1]": (
        "demo",
        {
            "context": 64,
            "prefill": 16,
            "routing": "sparse",
            "state": "explicit",
            "layout": "bct1",
            "expert_tokens": (1, 4),
        },
    ),
    "parts of a layer, no prefill": ("demo", {"context": 32, "prefill": 0, "max_shard_mb": 0.3}),
    "shift, carry": ("zaya", {"context": 64, "prefill": 8}),
    "real": ("qwen3_next", {"context": 64, "prefill": 8}),
    "tracks": ("pt_moe", {"context": 64, "prefill": 8}),
    "tail": ("afm", {"context": 64, "prefill": 8}),
    "chunks, rings": ("llama4_text", {"context": 64, "prefill": 8, "ring_caches": True}),
}

ALWAYS = ("masked", "sparse, explicit states, [1,C,T,1]", "shift, carry", "tail")


@dataclass(frozen=True)
class Written:
    out: Path
    index: dict
    tensors: dict[str, np.ndarray]


@pytest.fixture(scope="module", params=slow_but(ALWAYS, CONVERSIONS))
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    name, options = CONVERSIONS[request.param]
    folder = tmp_path_factory.mktemp("vectors")
    if name == "demo":
        checkpoint = demo_checkpoint()
    else:
        checkpoint = save_checkpoint(make_model(name), folder / "checkpoint")
    out = folder / "out"
    if "sparse" in request.param:  # and what shards guess
        options |= {"early": str(drawn_file(folder / "a.npz", 128, (0, 1, 2), 1))}
    convert(checkpoint, out, ConvertOptions(**({"recipe": FP16} | options)))
    write_vectors(out, folder / "vectors", runtime="reference")
    index = json.loads((folder / "vectors" / INDEX).read_text())
    return Written(out, index, load_file(folder / "vectors" / TENSORS))


def replay(written: Written) -> None:
    """All of the run by the plain host; an AssertionError where a byte is another."""
    host, ids = Host(written.out), written.index["ids"]
    for step in written.index["steps"]:
        own = ids[step["first"] : step["first"] + step["tokens"]]
        logits = host.take_prompt(own) if step["first"] == 0 else host.take_token(*own)
        np.testing.assert_array_equal(logits, written.tensors[step["logits"]])
    assert len(host.calls) == len(written.index["calls"])
    for (path, function, given, outputs), call in zip(
        host.calls, written.index["calls"], strict=True
    ):
        assert (path, function) == (call["package"], call["function"])
        for arrays, values in ((given, call["inputs"]), (outputs, call["outputs"])):
            assert arrays.keys() == values.keys()
            for name, value in values.items():
                where = f"{path} {function} {name}, {value['slot']}"
                np.testing.assert_array_equal(arrays[name], written.tensors[value["tensor"]], where)


def test_a_host_of_the_pages_rules_makes_the_same_bytes(written: Written) -> None:
    replay(written)


def no_mask(host: Host, mask: np.ndarray, *_: object) -> None:
    mask.fill(0)


def no_sums(host: Host, entries: list) -> list:
    return []


@pytest.mark.parametrize(("rule", "broken"), [("mask", no_mask), ("sums", no_sums)])
def test_a_host_that_breaks_a_rule_is_found(
    written: Written, rule: str, broken: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Host(written.out)
    if rule == "sums" and not whole.sums(whole.decode_lane.body):
        pytest.skip("nothing is summed by the host")
    monkeypatch.setattr(Host, rule, broken)
    with pytest.raises(AssertionError):
        replay(written)


def test_the_logits_are_the_sessions(written: Written) -> None:
    session, ids = Session(load_shards(written.out, "reference")), written.index["ids"]
    for step in written.index["steps"]:
        own = ids[step["first"] : step["first"] + step["tokens"]]
        logits = session.prefill(own) if step["first"] == 0 else session.decode(*own)
        np.testing.assert_array_equal(logits, written.tensors[step["logits"]])


def test_the_index_names_every_slot_and_tensor_once(written: Written) -> None:
    calls = written.index["calls"]
    values = [v for call in calls for side in ("inputs", "outputs") for v in call[side].values()]
    named = [value["tensor"] for value in values]
    named += [step["logits"] for step in written.index["steps"]]
    assert sorted(named) == sorted(written.tensors) and len(set(named)) == len(named)
    meta = json.loads((written.out / "runtime_meta.json").read_text())
    slots = {
        port["slot"]
        for ports in meta["interfaces"]
        for role in ("inputs", "outputs")
        for port in ports[role]
    }
    assert {value["slot"] for value in values} <= slots
    assert len(written.index["ids"]) == 20 and len(written.index["steps"]) == 5


def test_the_host_imports_nothing_of_the_loop() -> None:
    tree = ast.parse(Path(plain_host.__file__).read_text())
    ours = {
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("ane_moe")
    }
    assert ours == {"ane_moe.runtime"}


def test_the_page_names_every_slot_that_a_host_fills() -> None:
    from ane_moe.loop.buffers import RULES

    page = (Path(__file__).parents[2] / "docs" / "hosts.md").read_text()
    assert all(f"| `{name}" in page for name in RULES)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command") / "out"
    return tiny_conversion(demo_checkpoint(), folder, context=32)


def test_the_command_says_where_they_are(out: Path, tmp_path: Path) -> None:
    arguments = ["vectors", str(out), str(tmp_path / "v"), "--tokens", "3", "--decode", "1"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    found = json.loads(result.stdout)
    index = json.loads(Path(found["index"]).read_text())
    assert found["tokens"] == len(index["ids"]) == 3
    assert index["tensors"] == sha256(Path(found["tensors"]))
    assert index["manifest"] == sha256(out / "runtime_meta.json")


@pytest.mark.parametrize(
    ("options", "words"),
    [({"decoded": 20}, "no prompt"), ({"tokens": 40}, "do not fit into the context")],
)
def test_a_run_that_is_not_possible_is_refused(
    out: Path, tmp_path: Path, options: dict, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        write_vectors(out, tmp_path / "v", **options)
    assert not (tmp_path / "v").exists()


def test_an_encoder_has_none(tmp_path: Path) -> None:
    out = tiny_conversion(privacy_checkpoint(), tmp_path / "out", lengths=(32,))
    with pytest.raises(UserError, match="generates none"):
        write_vectors(out, tmp_path / "v")
