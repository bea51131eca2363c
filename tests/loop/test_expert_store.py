"""Experts read from a store: the same numbers as experts in packages, whatever is read when, and one
clear error where the disk fails."""

import errno
import os
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from ane_moe.checkpoints.checkpoint import Checkpoint
from ane_moe.conversion.pipeline import convert
from ane_moe.conversion.plan import ConvertOptions
from ane_moe.errors import UserError
from ane_moe.formats.recipe import FP16, find_recipe
from ane_moe.loop import expert_store, prefetch
from ane_moe.loop.expert_store import StoreFile, views
from ane_moe.loop.generation import GenerateOptions, generate
from ane_moe.loop.prefetch import Predictor
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from ane_moe.manifest import read_manifest
from tests.models import make_model, save_checkpoint

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "num_hidden_layers": 3,
    "moe_intermediate_size": 24,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "mlp_only_layers": [],
}
IDS = np.random.default_rng(0).integers(3, 61, 14).tolist()
SIZE = 16_384  # of an expert here: less than a page
K, LAYERS = 3, 3


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(
        make_model("qwen3_moe", seed=1, **SMALL), tmp_path_factory.mktemp("store") / "checkpoint"
    )


def converted(checkpoint: Path, name: str, recipe=FP16, **options) -> Path:
    out = checkpoint.parent / name
    usual = {"context": 64, "prefill": 8, "expert_tokens": (1, 4)}
    convert(checkpoint, out, ConvertOptions(**usual | options | {"recipe": recipe}))
    return out


@pytest.fixture(scope="module")
def store(checkpoint):
    return converted(checkpoint, "stream", routing="stream")


@pytest.fixture(scope="module")
def sparse(checkpoint):
    return converted(checkpoint, "sparse", routing="sparse")


@pytest.fixture
def copy(store, tmp_path):
    return Path(shutil.copytree(store, tmp_path / "copy"))


def session_of(folder: Path, experts: int | None = None, **options) -> Session:
    limit = None if experts is None else experts * SIZE
    return Session(load_shards(folder, "reference", expert_cache_bytes=limit), **options)


def logits_of(session: Session) -> np.ndarray:
    """Of a prompt, and of tokens after it, one by one."""
    rows = [session.prefill(IDS[:9]).copy()]
    return np.stack([*rows, *(session.decode(token).copy() for token in IDS[9:])])


@pytest.fixture(scope="module")
def expected(store):
    return logits_of(session_of(store))


def test_a_store_gives_what_packages_give_to_the_bit(store, sparse, expected):
    of_packages = logits_of(session_of(sparse))
    np.testing.assert_array_equal(expected, of_packages)


@pytest.mark.parametrize("name", ["int8", "lut4", "apple2"])
def test_and_does_so_in_every_weight_format(checkpoint, name):
    rows = {}
    for routing in ("sparse", "stream"):
        out = converted(checkpoint, f"{routing}-{name}", find_recipe(name), routing=routing)
        rows[routing] = logits_of(session_of(out))
    np.testing.assert_array_equal(rows["stream"], rows["sparse"])


def test_a_store_holds_the_tensors_of_the_checkpoint(checkpoint, store):
    tensors = load_file(checkpoint / "model.safetensors")
    (shard,) = read_manifest(store).shards_of("experts", 1)
    record = shard.store.record
    file, buffer = StoreFile(store / shard.path, shard.store, shard.content_key), bytearray(SIZE)
    raw = np.frombuffer(buffer, np.uint8)
    for expert in (5, 0, 7):
        file.read(expert, raw)
        for name, value in views(record, raw).items():
            matrix = name.split(".")[2]
            stored = tensors[f"model.layers.1.mlp.experts.{expert}.{matrix}_proj.weight"]
            np.testing.assert_array_equal(value[:, :, 0, 0], stored.astype(np.float16))
    assert file.bytes_read == 3 * record.size == 3 * SIZE
    assert (store / shard.path).stat().st_size > 8 * SIZE  # and the line after them


def test_one_graph_serves_every_layer(store):
    manifest = read_manifest(store)
    graphs = {shard.store.graph for shard in manifest.shards if shard.store}
    assert graphs == {"experts/graph_00.mlpackage"}
    assert [shard.path for shard in manifest.shards_of("expert_graph")] == [*graphs]


def test_a_decode_step_reads_k_experts_of_each_layer_and_copies_none_of_their_inputs(store):
    session = session_of(store)
    before = session.figures.decode.copies
    session.decode(7)
    cache = session.figures.cache
    assert cache.misses == K * LAYERS and cache.bytes_loaded == K * LAYERS * SIZE
    # What attention gives goes into slots: stream, ffn_input and gates; then the head's two parts.
    assert session.figures.decode.copies - before == 3 * LAYERS + 2
    assert session.figures.decode.most_at_once == 1


class Wrong(Predictor):
    """Names experts at random."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def predict(self, layer, hidden):
        return self.random.sample(range(8), 3)

    def observe(self, layer, experts):
        pass


@given(
    seed=st.integers(0, 1 << 16),
    experts=st.sampled_from([1, 2, 5, None]),
    concurrency=st.sampled_from([1, 3]),
    predictor=st.sampled_from(["none", "previous", "router", "wrong"]),
    failing=st.sampled_from([0.0, 0.1]),
)
@settings(max_examples=12, deadline=None)
def test_results_are_the_same_to_the_bit_whatever_is_read_when(
    store, expected, seed, experts, concurrency, predictor, failing
):
    chance, read = random.Random(seed), StoreFile.read

    def slow(self, expert, into):
        time.sleep(chance.choice([0, 0, 0.001]))
        if chance.random() < failing:
            raise UserError("the disk fails now and then")
        read(self, expert, into)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoreFile, "read", slow)
        patch.setitem(prefetch.PREDICTORS, "wrong", lambda *given: Wrong(seed))
        session = session_of(store, experts, concurrency=concurrency, predictor=predictor)

        def until_done(call):
            while True:
                try:
                    return call().copy()
                except UserError:
                    assert failing

        def prompt():
            session.reset()
            return session.prefill(IDS[:9])

        rows = [until_done(prompt)]
        rows += [until_done(lambda token=token: session.decode(token)) for token in IDS[9:]]
        session.shards.cache.settle()
    np.testing.assert_array_equal(np.stack(rows), expected)
    if experts is not None:
        assert session.figures.cache.bytes_peak <= experts * SIZE


def test_memory_of_experts_that_left_is_used_again(store, monkeypatch):
    made = []
    mapped = expert_store.mmap.mmap

    def counted(descriptor, *given, **named):
        made.extend(given if descriptor == -1 else ())
        return mapped(descriptor, *given, **named)

    monkeypatch.setattr(expert_store.mmap, "mmap", counted)
    session = session_of(store, experts=4)
    logits_of(session)
    assert session.figures.cache.evictions > 10 and made == [SIZE] * 4


def test_a_disk_error_is_one_clear_error_and_the_session_goes_on(store, expected, monkeypatch):
    session, preadv = session_of(store, experts=3), os.preadv
    rows = [session.prefill(IDS[:9]).copy(), session.decode(IDS[9]).copy()]
    monkeypatch.setattr(os, "preadv", failing_read)
    with pytest.raises(UserError, match=r"expert \d+ in .*layer_0\d\.bin cannot be read.*[Ee]rror"):
        session.decode(IDS[10])
    monkeypatch.setattr(os, "preadv", preadv)
    rows += [session.decode(token).copy() for token in IDS[10:]]
    np.testing.assert_array_equal(np.stack(rows), expected)


@pytest.mark.slow
def test_after_a_disk_error_at_token_500_generate_goes_on_with_the_same_text(tmp_path, monkeypatch):
    model = make_model("qwen3_moe", seed=1, **SMALL | {"max_position_embeddings": 1024})
    folder = save_checkpoint(model, tmp_path / "checkpoint")
    out = converted(folder, "long", routing="stream", context=600, prefill=0)
    options = GenerateOptions(max_tokens=520)
    expected = [piece.id for piece in generate(session_of(out, experts=5), IDS, options)]
    session, preadv, ids = session_of(out, experts=5), os.preadv, []
    with pytest.raises(UserError, match="cannot be read"):
        for piece in generate(session, IDS, options):
            ids.append(piece.id)
            if len(ids) == 500:
                monkeypatch.setattr(os, "preadv", failing_read)
    assert ids == expected[: len(ids)] and 500 <= len(ids) < 520
    monkeypatch.setattr(os, "preadv", preadv)
    rest = GenerateOptions(max_tokens=520 - len(ids))
    ids += [piece.id for piece in generate(session, IDS + ids, rest, taken=session.position)]
    assert ids == expected


def failing_read(*_):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_reads_that_come_in_pieces_are_put_together(store, expected, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, to, at: preadv(fd, [to[0][:1000]], at))
    np.testing.assert_array_equal(logits_of(session_of(store)), expected)


def store_path(folder: Path, layer: int = 1) -> Path:
    return folder / f"experts/layer_{layer:02d}.bin"


def change_every_expert(path: Path) -> None:
    with path.open("r+b") as stream:
        for expert in range(8):
            stream.seek(expert * SIZE + 5)
            stream.write(b"\xff")


def test_a_file_cut_short_while_it_is_open_is_an_error(copy):
    session = session_of(copy, experts=3)
    session.prefill(IDS)
    os.truncate(store_path(copy), SIZE // 2)
    with pytest.raises(UserError, match=r"layer_01\.bin is cut short.*convert again"):
        for token in IDS:
            session.decode(token)


def test_a_record_that_changed_is_an_error_on_its_first_use(copy):
    change_every_expert(store_path(copy))
    with pytest.raises(UserError, match=r"expert \d+ in .*layer_01\.bin is not what was written"):
        session_of(copy).prefill(IDS)


def test_a_record_that_changes_later_is_an_error_too(copy):
    session = session_of(copy, experts=1)
    session.prefill(IDS)
    change_every_expert(store_path(copy))
    with pytest.raises(UserError, match="is not what was written"):
        session.decode(IDS[0])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: os.truncate(path, 5 * SIZE), "damaged or cut short"),
        (lambda path: shutil.copy(store_path(path.parents[1], 0), path), "of another conversion"),
    ],
)
def test_files_that_are_not_those_of_the_manifest_are_refused(copy, damage, message):
    damage(store_path(copy))
    with pytest.raises(UserError, match=rf"layer_01\.bin .*{message}|{message}"):
        session_of(copy)


def test_reading_around_the_page_cache_gives_the_same_or_is_refused(store, expected):
    try:
        shards = load_shards(store, "reference", direct=True)
    except UserError as error:
        assert "--direct" in str(error)
    else:
        np.testing.assert_array_equal(logits_of(Session(shards)), expected)


def test_a_finished_store_is_kept_and_one_that_changed_is_written_again(checkpoint, copy):
    options = ConvertOptions(
        routing="stream", context=64, prefill=8, expert_tokens=(1, 4), recipe=FP16
    )
    before = store_path(copy).read_bytes()
    report = convert(checkpoint, copy, options)
    assert not report.written
    path = store_path(copy, 2)
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    store_path(copy).unlink()
    report = convert(checkpoint, copy, options)
    assert report.written == ("experts/layer_01.bin", "experts/layer_02.bin")
    assert store_path(copy).read_bytes() == before
    other = convert(checkpoint, copy, ConvertOptions(recipe=FP16, context=64), overwrite=True)
    assert other.manifest.routing == "masked" and not store_path(copy).exists()


def test_a_conversion_that_breaks_off_leaves_no_half_store(checkpoint, tmp_path, monkeypatch):
    options = ConvertOptions(routing="stream", context=64, prefill=0, recipe=FP16)
    calls, read = [], Checkpoint.read

    def breaking(self, *given, **named):
        calls.append(given)
        if len(calls) == 30:
            raise KeyboardInterrupt
        return read(self, *given, **named)

    monkeypatch.setattr(Checkpoint, "read", breaking)
    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint, tmp_path / "out", options)
    left = sorted(path.name for path in (tmp_path / "out" / "experts").iterdir())
    assert left == ["layer_00.bin"]  # whole, since 24 of the 30 are its weights
    monkeypatch.setattr(Checkpoint, "read", read)
    assert "experts/layer_00.bin" in convert(checkpoint, tmp_path / "out", options).reused


def test_experts_in_several_formats_are_refused(checkpoint, tmp_path):
    recipe = find_recipe("int8")
    own = {"layers.1.ffn.experts.3.up.weight": "lut4"}
    options = ConvertOptions(routing="stream", recipe=replace(recipe, overrides=own))
    with pytest.raises(UserError, match=r"layer 1: a store holds all experts .* same formats"):
        convert(checkpoint, tmp_path / "out", options)


def test_functions_of_several_experts_are_refused(checkpoint, tmp_path):
    options = ConvertOptions(routing="stream", experts_per_function=2)
    with pytest.raises(UserError, match="read expert by expert"):
        convert(checkpoint, tmp_path / "out", options)


def test_states_that_cannot_be_taken_back_begin_anew(tmp_path, monkeypatch):
    """A short convolution keeps what a broken-off call has moved on."""
    folder = save_checkpoint(make_model("lfm2_moe"), tmp_path / "checkpoint")
    options = ConvertOptions(routing="stream", context=64, prefill=0, recipe=FP16)
    convert(folder, tmp_path / "out", options)
    session, preadv = session_of(tmp_path / "out"), os.preadv
    expected = session.prefill(IDS).copy()
    session = session_of(tmp_path / "out")
    monkeypatch.setattr(os, "preadv", failing_read)
    with pytest.raises(UserError, match="cannot be read"):
        session.prefill(IDS)
    monkeypatch.setattr(os, "preadv", preadv)
    assert session.position == 0
    np.testing.assert_array_equal(session.prefill(IDS), expected)
