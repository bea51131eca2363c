"""Embeddings in place of ids: against Hugging Face's `inputs_embeds`, and files that are none."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ane_moe.cli import app
from ane_moe.conversion.pipeline import convert
from ane_moe.conversion.plan import ConvertOptions
from ane_moe.errors import UserError
from ane_moe.formats.recipe import FP16
from ane_moe.loop.embeddings_file import read_embeddings
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from ane_moe.manifest import read_manifest
from ane_moe.verification.verify import verify
from tests.models import save_checkpoint
from tests.verification.tiny import tiny_checkpoint, tiny_model

CLOSE = 0.02  # of the largest logit: fp16 arithmetic
PROMPT = [5, 9, 2, 40, 17]


@pytest.mark.parametrize("family", ["granitemoe", "mixtral"])  # granite multiplies what is given
def test_logits_are_those_of_inputs_embeds(family: str, tmp_path: Path) -> None:
    model = tiny_model(family).eval()
    source = save_checkpoint(model, tmp_path / "checkpoint")
    convert(source, tmp_path / "out", ConvertOptions(prefill=4, recipe=FP16))
    given = torch.randn(1, 7, 24, generator=torch.Generator().manual_seed(0)) * 0.1
    with torch.no_grad():
        theirs = model.float()(inputs_embeds=given).logits[0, -1].numpy()
    session = Session(load_shards(tmp_path / "out", "reference"))
    ours = session.prefill_embeddings(given[0].numpy())
    assert np.abs(ours - theirs).max() <= CLOSE * np.abs(theirs).max()
    assert session.position == 7


def test_a_conversion_without_table_verifies_and_takes_embeddings_alone(tmp_path: Path) -> None:
    source = tiny_checkpoint("granitemoe", tmp_path / "checkpoint")
    outs = {inputs: tmp_path / inputs for inputs in ("ids", "embeds")}
    for inputs, out in outs.items():
        options = ConvertOptions(prefill=4, recipe=FP16, inputs=inputs)
        convert(source, out, options, golden=True)
    assert read_manifest(outs["embeds"]).embed is None
    assert not (outs["embeds"] / "embed.bin").exists()
    proofs = {inputs: verify(out, runtime="reference") for inputs, out in outs.items()}
    assert not proofs["embeds"].failures and not proofs["embeds"].integrity
    with_table = [row for row in proofs["ids"].shards if row.kind == "embed"]
    assert len(proofs["ids"].shards) == len(proofs["embeds"].shards) + len(with_table) > 3
    whole = [[row.logit_cosine for row in proof.models] for proof in proofs.values()]
    assert whole[0] == whole[1] and whole[0]
    one, other = (Session(load_shards(out, "reference")) for out in outs.values())
    scale = one.manifest.embed_scale
    rows = one.shards.embed[np.asarray(PROMPT)].astype(np.float32) / scale
    logits = one.prefill(PROMPT).copy()
    assert np.allclose(other.prefill_embeddings(rows), logits, atol=1e-2 * np.abs(logits).max())
    with pytest.raises(UserError, match="has no embedding table"):
        other.decode(3)


def test_generate_continues_from_a_file(tmp_path: Path) -> None:
    source = tiny_checkpoint("mixtral", tmp_path / "checkpoint")
    convert(source, tmp_path / "out", ConvertOptions(prefill=4, recipe=FP16))
    table = load_shards(tmp_path / "out", "reference").embed
    np.save(tmp_path / "given.npy", table[np.asarray(PROMPT)].astype(np.float32))
    found = []
    for prompt in (["--embeddings", str(tmp_path / "given.npy")], ["--prompt-ids", "5,9,2,40,17"]):
        call = ["generate", str(tmp_path / "out"), "--max-tokens", "5", "--json", *prompt]
        result = CliRunner().invoke(app, [*call, "--runtime", "reference"])
        assert result.exit_code == 0, result.output
        found.append(json.loads(result.stdout)["ids"])
    assert found[0] == found[1] and len(found[0]) == 5


class Harm:
    def __reduce__(self):
        raise AssertionError("unpickled")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (np.zeros((3, 5), np.float32), "holds no embeddings of this model; found: shape (3, 5)"),
        (np.zeros((0, 4), np.float32), "holds no embeddings of this model"),
        (np.zeros((1, 3, 4), np.float32), "holds no embeddings of this model"),
        (np.zeros((3, 4), np.int32), "holds no floats; found: int32"),
        (np.full((3, 4), np.nan, np.float16), "holds 12 numbers that are NaN"),
        (np.full((3, 4), 1e300), "holds 12 numbers that are NaN, infinite or beyond fp32"),
        (np.array([{"a": 1}], object), "cannot be read as embeddings"),
        (b"no numpy at all", "cannot be read as embeddings"),
        (b"", "cannot be read as embeddings"),
    ],
)
def test_what_is_no_file_of_embeddings_is_one_line(content, told: str, tmp_path: Path) -> None:
    file = tmp_path / "given.npy"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        np.save(file, content, allow_pickle=True)
    with pytest.raises(UserError) as caught:
        read_embeddings(file, 4)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_a_header_that_claims_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "given.npy"
    np.save(file, np.zeros((8, 4), np.float32))
    stored = file.read_bytes()
    longer = stored.replace(b"(8, 4), }       ", b"(80000000, 4), }")
    cut_header = stored.replace(b"(8, 4), }", b"(8, 4")
    for damaged in (longer, cut_header, stored[:-9], stored[:40]):
        assert damaged != stored
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be read as embeddings") as caught:
            read_embeddings(file, 4)
        assert "\n" not in str(caught.value)
    np.savez(tmp_path / "several.npz", a=np.zeros((8, 4)))
    with pytest.raises(UserError, match="holds several arrays"):
        read_embeddings(tmp_path / "several.npz", 4)
    with pytest.raises(UserError, match="No such file"):
        read_embeddings(tmp_path / "nowhere.npy", 4)
