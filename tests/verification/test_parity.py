"""Parity over shards made of numpy functions: for any state, layout, parts and windows, right
passes, wrong fails."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ane_moe.errors import UserError
from ane_moe.original.golden import Golden, LayerGolden
from ane_moe.verification.goldens import with_switched
from ane_moe.verification.parity import Parity
from ane_moe.verification.result import RoutingResult, ShardResult
from ane_moe.verification.stage import stages
from tests.runtime.numpy_shards import (
    DIM,
    EXPERTS,
    HEADS,
    INV_FREQ,
    VOCAB,
    Decoder,
    expert,
    gates,
    make_manifest,
    make_shards,
    norm,
    rotate,
    softmax,
)

GATE = 0.999
PROMPT_LENGTHS = (19, 1, 8)
CHOSEN = 2


def golden_of(decoder, lengths=PROMPT_LENGTHS):
    """The decoder's activations in fp64, prompt by prompt, without a cache."""
    rng = np.random.default_rng(3)
    prompts = tuple(tuple(rng.integers(0, VOCAB, length).tolist()) for length in lengths)
    rows = [[] for _ in decoder.layers]
    logits = []
    for ids in prompts:
        x = decoder.embed[list(ids)].astype(np.float64).T
        t = np.arange(len(ids))
        angles = np.asarray(INV_FREQ)[:, None] * t
        for index, (w, window) in enumerate(zip(decoder.layers, decoder.windows, strict=True)):
            seen = (t[None, :] <= t[:, None]) & (t[:, None] - t[None, :] < (window or len(ids)))
            q, k, v = ((w[n] @ norm(x)).reshape(HEADS, DIM, -1) for n in "qkv")
            q, k = (rotate(a, np.cos(angles), np.sin(angles)) for a in (q, k))
            scores = np.where(seen, np.einsum("hct,hcs->hts", q, k), -np.inf)
            attn = w["o"] @ np.einsum("hts,hcs->hct", softmax(scores), v).reshape(HEADS * DIM, -1)
            middle = x + attn
            routed = gates(w, norm(middle), decoder.k)
            ffn = sum(expert(w, e, norm(middle)) * routed[e] for e in range(EXPERTS))
            probs = softmax((w["router"] @ norm(middle)).T)
            rows[index].append(
                (x.T, attn.T, ffn.T, probs, np.argsort(-probs, kind="stable")[:, : decoder.k])
            )
            x = middle + ffn
        logits.append((decoder.head @ norm(x)).T)
    layers = {
        index: LayerGolden(
            *(np.concatenate(parts).astype(np.float32) for parts in zip(*layer, strict=True))
        )
        for index, layer in enumerate(rows)
    }
    return Golden(prompts, layers, np.concatenate(logits).astype(np.float32), len(decoder.layers))


def parity_of(decoder, golden, folder, windows, decode_tokens=None, **options):
    manifest = make_manifest(windows, **options)
    shards = make_shards(decoder, manifest)
    decoder.embed.tofile(folder / "embed.bin")
    by_path = {one.shard.path: one for one in shards.loaded}
    facts = (folder, manifest, golden, GATE, decode_tokens, shards.ropes)
    return Parity(*facts, lambda shard: by_path[shard.path]), shards.loaded


def rows_of(parity_and_shards):
    parity, loaded = parity_and_shards
    by_path = {one.shard.path: one for one in loaded}
    yield from parity.embed()
    for stage in stages(parity.manifest):
        yield from parity.stage([by_path[shard.path] for shard in stage])


def failed(parity):
    return {
        (row.kind, row.layer)
        for row in rows_of(parity)
        if isinstance(row, ShardResult) and not row.passed
    }


@given(
    prefill=st.sampled_from([0, 1, 8, 16]),
    state=st.sampled_from(["mlstate", "explicit"]),
    layout=st.sampled_from(["bc1s", "bct1"]),
    parts=st.integers(1, 3),
    windows=st.lists(st.sampled_from([None, 1, 4]), min_size=1, max_size=2),
    decode_tokens=st.sampled_from([None, 1, 5]),
)
@settings(max_examples=30, deadline=None)
def test_right_shards_pass_every_row(
    tmp_path_factory, prefill, state, layout, parts, windows, decode_tokens
):
    decoder = Decoder(tuple(windows), k=CHOSEN)
    parity = parity_of(
        decoder,
        golden_of(decoder),
        tmp_path_factory.mktemp("p"),
        tuple(windows),
        decode_tokens,
        prefill=prefill,
        state=state,
        layout=layout,
        parts=parts,
    )
    rows = list(rows_of(parity))
    functions = 2 if prefill else 1
    assert all(row.passed for row in rows if isinstance(row, ShardResult))
    shards = [row for row in rows if isinstance(row, ShardResult)]
    assert len(shards) == 1 + functions * (len(windows) * (1 + parts) + 2)
    for row in rows:
        if isinstance(row, RoutingResult):
            assert row.set_agreement > 0.95 and row.gate_mass_outside_top_k < 0.05
        elif row.function == "prefill" or not prefill or decode_tokens is None:
            assert row.tokens == sum(PROMPT_LENGTHS)
        elif row.kind == "attn":
            assert row.tokens == sum(
                min(length, max(1, decode_tokens // 3)) for length in PROMPT_LENGTHS
            )
        elif row.kind != "embed":
            assert row.tokens == decode_tokens


def altered(decoder, name, change, layer=1):
    other = dataclasses.replace(decoder)
    other.layers[layer][name] = change(other.layers[layer][name])
    return other


@pytest.mark.parametrize(
    ("name", "kind"),
    [("q", "attn"), ("v", "attn"), ("router", "moe"), ("up", "moe"), ("down", "moe")],
)
def test_a_wrong_weight_fails_its_own_shard_and_no_other(name, kind, tmp_path):
    decoder = Decoder((None, None), k=CHOSEN)
    wrong = altered(decoder, name, lambda weight: np.roll(weight, 1, axis=0))
    assert failed(parity_of(wrong, golden_of(decoder), tmp_path, (None, None))) == {(kind, 1)}


def test_another_number_of_experts_shows_in_parity_and_routing(tmp_path):
    decoder = Decoder((None,), k=CHOSEN)
    parity = parity_of(Decoder((None,), k=EXPERTS), golden_of(decoder), tmp_path, (None,))
    assert failed(parity) == {("moe", 0)}
    routing = next(row for row in rows_of(parity) if isinstance(row, RoutingResult))
    assert routing.set_agreement == 0
    assert routing.gate_mass_outside_top_k == pytest.approx(routing.mass_outside_top_k, abs=1e-3)


def test_a_window_off_by_one_fails(tmp_path):
    decoder = Decoder((4,), k=CHOSEN)
    assert failed(parity_of(decoder, golden_of(decoder), tmp_path, (5,))) == {("attn", 0)}


def test_a_wrong_embedding_table_fails_alone(tmp_path):
    decoder = Decoder((None,), k=CHOSEN)
    parity = parity_of(decoder, golden_of(decoder), tmp_path, (None,))
    (2 * decoder.embed + 1).tofile(tmp_path / "embed.bin")
    assert failed(parity) == {("embed", None)}


def test_nan_in_an_output_is_the_reason(tmp_path):
    decoder = Decoder((None,), k=CHOSEN)
    wrong = altered(decoder, "down", lambda weight: weight * np.nan, layer=0)
    rows = rows_of(parity_of(wrong, golden_of(decoder), tmp_path, (None,)))
    row = next(row for row in rows if row.kind == "moe")
    assert not row.passed and row.cosine is None and row.reason == "NaN or Inf in the output"


def test_the_last_prefill_chunk_is_padded_and_its_padding_ignored(tmp_path):
    decoder = Decoder((None,), k=CHOSEN)
    golden = golden_of(decoder, lengths=(17,))
    assert not failed(parity_of(decoder, golden, tmp_path, (None,), prefill=16))


def test_an_adapter_that_a_conversion_lacks_is_refused_unless_it_is_merged():
    manifest = make_manifest((None,))
    with pytest.raises(UserError, match="there is no adapter other"):
        with_switched(manifest, ["other"])
    assert with_switched(manifest, ["other"], merged=True) is manifest
