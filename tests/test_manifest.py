"""Manifests of others: what they may not say is one line."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ane_moe.errors import UserError
from ane_moe.manifest import FILE_NAME, read_manifest
from tests.verification.tiny import tiny_checkpoint, tiny_conversion

DIGEST = "0" * 64


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("manifest")
    out = tiny_conversion(
        tiny_checkpoint("qwen3_moe", folder / "checkpoint"), folder / "out", routing="sparse"
    )
    read_manifest(out)
    return json.loads((out / FILE_NAME).read_text())


def changed(told: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return json.loads(json.dumps(told)) | fields


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"files": [1]}, r"files is '\[1\]'"),
        ({"files": {"embed.bin": 3}}, r"files\[embed\.bin\] is '3'"),
        ({"files": {"embed.bin": DIGEST[1:]}}, r"files\[embed\.bin\] is '0{63}'"),
        ({"files": {"a": DIGEST, "a/b/c": DIGEST}}, "'a'.*a file and a folder"),
        ({"files": {"a" * 300: DIGEST}}, "the name of a file is 'aaa"),
        ({"files": {"a/" * 600 + "b": DIGEST}}, "the name of a file is 'a/a/"),
        ({"files": {"a//b": DIGEST}}, "the name of a file is 'a//b'"),
        ({"files": {"\ud800": DIGEST}}, "UnicodeEncodeError"),
        ({"files": {"../a": DIGEST}}, "outside its folder; found: '../a'"),
        ({"files": {"a\0b": DIGEST}}, "outside its folder"),
        ({"tokenizer": [1]}, "the name of a file is '1'"),
        ({"early": "/etc/passwd"}, "outside its folder"),
        ({"early": 1}, "the name of a file is '1'"),
        ({"adapters": {"x": {"golden": "../x"}}}, "outside its folder"),
        ({"adapters": {"x": "golden"}}, r"adapters\[x\] is 'golden'"),
        ({"moe": []}, r"moe is '\[\]'"),
        ({"moe": {"first": {"experts": 4, "k": 2}}}, r"moe\[first\] is"),
        ({"moe": {"0": {"experts": 4}}}, r"moe\[0\] is"),
        ({"moe": {"0": {"experts": 4, "k": "z"}}}, r"moe\[0\] is .*z"),
        ({"moe": {"0": {"experts": 4, "k": True}}}, r"moe\[0\] is"),
        ({"moe": {"0": {"experts": 4, "k": 2, "guesses": {}}}}, r"moe\[0\] is"),
        ({"moe": {"0": {"experts": 4, "k": 2, "router": "../r"}}}, "outside its folder"),
        ({"moe": {"0": {"experts": 4, "k": 2, "more": 1}}}, r"moe\[0\] is"),
    ],
)
def test_what_cannot_be_is_one_line(
    told: dict[str, Any], tmp_path: Path, fields: dict[str, Any], said: str
) -> None:
    (tmp_path / FILE_NAME).write_text(json.dumps(changed(told, **fields)))
    with pytest.raises(UserError, match=said) as raised:
        read_manifest(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_manifest_that_is_too_large_or_too_deep_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    depth = 100 * sys.getrecursionlimit()
    (tmp_path / FILE_NAME).write_text("[" * depth + "]" * depth)
    with pytest.raises(UserError, match="RecursionError"):
        read_manifest(tmp_path)
    monkeypatch.setattr("ane_moe.manifest.MAX_BYTES", depth)
    with pytest.raises(UserError, match=f"is too large; found: {2 * depth} bytes"):
        read_manifest(tmp_path)
