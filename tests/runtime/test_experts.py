"""Dispatched experts against the same decoder with its experts in one graph, and against a
whole-text oracle."""

import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ane_moe.errors import UserError
from ane_moe.loop.expert_cache import ExpertCache, FunctionKey
from ane_moe.loop.experts import ExpertDispatch, Group, expert_layers
from ane_moe.loop.figures import CallClock, PhaseFigures
from ane_moe.loop.prefetch import LayerBefore
from ane_moe.loop.router_table import read_routers
from ane_moe.loop.session import Session
from ane_moe.manifest import Shard
from tests.runtime.numpy_shards import (
    EXPERTS,
    VOCAB,
    D,
    Decoder,
    expert,
    expert_function,
    gates,
    make_cache,
    make_manifest,
    make_shards,
)

TOLERANCE = 0.05  # fp16 activations against fp64, on logits of about unit variance
K = 2


def sparse(windows=(None, None), k=K, cache=None, session=None, **options):
    decoder = Decoder(windows, k=k)
    shards = make_shards(
        decoder, make_manifest(windows, routing="sparse", **options), **(cache or {})
    )
    return decoder, Session(shards, **(session or {}))


def tokens(count, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, count).tolist()


def dispatch_of(decoder, manifest, concurrency=1, **cache_options):
    return ExpertDispatch(
        expert_layers(manifest), make_cache(decoder, manifest, **cache_options), concurrency
    )


@given(
    count=st.integers(1, 30),
    k=st.integers(1, EXPERTS),
    group=st.integers(1, 3),
    parts=st.integers(1, 2),
    buckets=st.sampled_from([(1,), (1, 4), (1, 2, 16), (3, 5)]),
    layout=st.sampled_from(["bc1s", "bct1"]),
    shared=st.booleans(),
    concurrency=st.sampled_from([1, 3]),
)
@settings(max_examples=80, deadline=None)
def test_every_token_gets_exactly_its_experts(
    count, k, group, parts, buckets, layout, shared, concurrency
):
    decoder = Decoder((None,))
    manifest = make_manifest(
        (None,),
        routing="sparse",
        group=group,
        parts=parts,
        buckets=buckets,
        layout=layout,
        shared=shared,
    )
    w, x = (
        decoder.layers[0],
        np.random.default_rng(count).normal(size=(D, count)).astype(np.float16),
    )
    g = gates(w, x.astype(np.float64), k).astype(np.float16)
    dispatch = dispatch_of(decoder, manifest, concurrency)
    total = np.ones((D, count), np.float32)
    dispatch.add(0, dispatch.chosen(0, g), x, g, total, CallClock(PhaseFigures()))
    expected = 1 + sum(
        expert(w, e, x.astype(np.float64)) * g[e].astype(np.float64) for e in range(EXPERTS)
    )
    np.testing.assert_allclose(total, expected + (x / 2 if shared else 0), atol=2e-2)


GROUPS = ((0, 3), (1, 4), (2,))


def with_groups(manifest, groups=GROUPS):
    """The manifest with its one expert package cut into groups that are no neighbours."""
    functions = tuple(
        expert_function(f"expert_{name[0]:03d}_t{count}", count, group)
        for name, group in zip(GROUPS, groups, strict=False)
        for count in (1, 4)
    )
    return replace(
        manifest,
        shards=tuple(
            replace(shard, functions=functions) if shard.kind == "experts" else shard
            for shard in manifest.shards
        ),
    )


@given(count=st.integers(1, 12), k=st.integers(1, EXPERTS))
@settings(max_examples=30, deadline=None)
def test_groups_of_experts_that_are_no_neighbours_get_their_own_gates(count, k):
    decoder = Decoder((None,))
    manifest = with_groups(make_manifest((None,), routing="sparse", group=2, parts=1))
    w, x = (
        decoder.layers[0],
        np.random.default_rng(count).normal(size=(D, count)).astype(np.float16),
    )
    g = gates(w, x.astype(np.float64), k).astype(np.float16)
    dispatch = dispatch_of(decoder, manifest)
    total = np.zeros((D, count), np.float32)
    dispatch.add(0, dispatch.chosen(0, g), x, g, total, CallClock(PhaseFigures()))
    expected = sum(
        expert(w, e, x.astype(np.float64)) * g[e].astype(np.float64) for e in range(EXPERTS)
    )
    np.testing.assert_allclose(total, expected, atol=2e-2)
    assert [group.experts for group in dispatch.layers[0].groups_of([4, 3])] == [(0, 3), (1, 4)]


@pytest.mark.parametrize(
    "groups", [((0, 3), (1, 4), (2, 2)), ((0, 3), (1, 4), (3,)), ((3, 0), (1, 4), (2,)), ((),)]
)
def test_groups_that_do_not_fit_the_package_are_refused(groups):
    manifest = with_groups(make_manifest((None,), routing="sparse", group=2, parts=1), groups)
    with pytest.raises(UserError, match="do not fit together"):
        expert_layers(manifest)


@given(
    length=st.integers(1, 40),
    state=st.sampled_from(["mlstate", "explicit"]),
    group=st.integers(1, 3),
    by=st.sampled_from(["prefill", "decode"]),
    parts=st.integers(1, 2),
)
@settings(max_examples=30, deadline=None)
def test_a_session_with_dispatched_experts_computes_the_model(length, state, group, by, parts):
    decoder, session = sparse((None, 4), k=EXPERTS, state=state, group=group, parts=parts)
    ids = tokens(length)
    np.testing.assert_allclose(
        session.prefill_logits(ids, by=by), decoder.logits(ids), atol=TOLERANCE
    )


def test_greedy_ids_are_those_of_masked_routing():
    def ids_of(session):
        logits, ids = session.prefill(tokens(9)), []
        while session.room:
            ids.append(int(np.argmax(logits)))
            logits = session.decode(ids[-1])
        return ids

    masked = Session(make_shards(Decoder((None, None), k=K), make_manifest((None, None))))
    assert ids_of(sparse()[1]) == ids_of(masked)


@pytest.mark.parametrize(
    "options",
    [
        {"session": {"concurrency": 2}},
        {"session": {"concurrency": 5}},
        {"cache": {"limit_bytes": 1000}},
        {"cache": {"limit_bytes": 1000}, "session": {"concurrency": 4}},
        {"cache": {"limit_bytes": 3500}, "session": {"predictor": "previous"}},
        {"cache": {"limit_bytes": 1000}, "session": {"predictor": "previous", "concurrency": 3}},
    ],
)
def test_results_do_not_depend_on_how_experts_are_loaded_and_run(options):
    def run(session):
        first = session.prefill(tokens(11)).copy()
        return np.stack(
            [first, *(session.decode(identifier).copy() for identifier in tokens(9, 1))]
        )

    np.testing.assert_array_equal(run(sparse(**options)[1]), run(sparse()[1]))


def test_a_decode_step_calls_and_loads_k_experts_per_layer():
    _, session = sparse()
    session.decode(3)
    assert session.figures.decode.kinds["experts"].calls == 2 * K
    assert (
        session.figures.cache.misses == 2 * K and session.figures.cache.bytes_loaded == 2 * K * 1000
    )


def test_the_cache_stays_inside_its_limit_and_counts():
    _, session = sparse(
        cache={"limit_bytes": 3000}, session={"concurrency": 3, "predictor": "previous"}
    )
    for identifier in tokens(30):
        session.decode(identifier)
    cache, figures = session.shards.cache, session.figures.cache
    cache.settle()
    assert figures.bytes_peak <= 3000 and figures.evictions > 0
    assert (
        figures.hits + figures.late + figures.misses
        == session.figures.decode.kinds["experts"].calls
    )
    assert figures.bytes_loaded == 1000 * len(cache.loads)


def test_least_recently_used_functions_leave_first():
    loads = []
    cache = ExpertCache(lambda key: loads.append(key.name) or key, lambda key: 10, 20)
    for name in "abacab":
        with cache.hold(FunctionKey("p", name)):
            pass
    assert loads == [
        "a",
        "b",
        "c",
        "b",
    ]  # c pushes b out, b pushes c out, a is always the more recent
    assert cache.figures.hits == 2 and cache.figures.evictions == 2


def test_a_function_in_use_is_not_dropped_and_whoever_needs_room_waits():
    cache = ExpertCache(lambda key: key, lambda key: 10, 10)
    entered = threading.Event()

    def other():
        with cache.hold(FunctionKey("p", "b")):
            entered.set()

    with cache.hold(FunctionKey("p", "a")):
        thread = threading.Thread(target=other)
        thread.start()
        assert not entered.wait(0.1)
    assert entered.wait(10)
    thread.join()


def test_functions_loaded_ahead_are_hits_when_called_and_unused_bytes_otherwise():
    _, session = sparse()
    cache = session.shards.cache
    a, b = (FunctionKey("experts/layer_00_part_0.mlpackage", f"expert_{e:03d}_t1") for e in (0, 1))
    cache.load_ahead([a, b])
    cache.settle()
    assert cache.figures.bytes_unused == 2000
    with cache.hold(a):
        pass
    assert (cache.figures.hits, cache.figures.misses, cache.figures.bytes_unused) == (1, 0, 1000)


def test_loading_ahead_does_not_push_out_what_runs_now():
    cache = ExpertCache(lambda key: key, lambda key: 10, 20)
    a, b, c, d = (FunctionKey("p", name) for name in "abcd")
    for key in (a, b):
        with cache.hold(key):
            pass
    cache.load_ahead([c, d], needed=[b])
    cache.settle()
    with cache.hold(b):
        pass
    assert cache.figures.hits == 1


def test_a_predictor_is_scored_against_what_the_gates_chose():
    _, session = sparse(session={"predictor": "previous"})
    for _ in range(5):
        session.reset()
        session.decode(7)  # the same token at the same place: the same experts
    prefetch = session.figures.prefetch
    assert (prefetch.needed, prefetch.predicted, prefetch.right) == (
        18,
        16,
        16,
    )  # all but the very first guess


def test_the_next_layers_router_is_right_where_nothing_is_added_in_between(tmp_path):
    decoder = Decoder((None, None, None), k=K)
    for w in decoder.layers:
        w["o"], w["down"] = np.zeros_like(w["o"]), np.zeros_like(w["down"])
    manifest = make_manifest(decoder.windows, routing="sparse")
    names = [f"router_{layer:02d}.bin" for layer in manifest.layers]
    for name, w in zip(names, decoder.layers, strict=True):
        w["router"].astype("<f2").tofile(tmp_path / name)
    manifest = replace(
        manifest,
        files=dict.fromkeys(names, ""),
        moe={
            str(layer): {"experts": EXPERTS, "k": K, "router": name}
            for layer, name in enumerate(names)
        },
    )
    figures = {}
    for name in ("previous", "router"):
        session = Session(replace(make_shards(decoder, manifest), folder=tmp_path), predictor=name)
        for identifier in tokens(40):
            session.decode(identifier)
        figures[name] = session.figures.prefetch
        assert figures[name].needed == (3 * 40 - 1) * K
    assert (
        figures["router"].right >= 2 * 40 * K
    )  # two layers of three; the first can only look back
    assert figures["router"].hit_rate > figures["previous"].hit_rate


@pytest.mark.parametrize("shared", [True, False])
def test_the_layer_before_is_right_where_layers_share_a_router(shared):
    """And nothing is added in between."""
    decoder = Decoder((None, None, None), k=K)
    for w in decoder.layers:
        w["o"], w["down"] = np.zeros_like(w["o"]), np.zeros_like(w["down"])
        if shared:
            w["router"] = decoder.layers[0]["router"]
    manifest = make_manifest(decoder.windows, routing="sparse")
    facts = {str(layer): {"experts": EXPERTS, "k": K} for layer in manifest.layers}
    session = Session(make_shards(decoder, replace(manifest, moe=facts)), predictor="layer")
    for identifier in tokens(40):
        session.decode(identifier)
    figures = session.figures.prefetch
    assert figures.needed == (3 * 40 - 1) * K
    assert (figures.right >= 2 * 40 * K) == shared  # the first layer can only look back


def test_the_layer_before_by_hand():
    predictor = LayerBefore({0: 4, 1: 4, 3: 6})
    assert predictor.predict(0, None) == ()
    assert predictor.predict(1, np.zeros(2)) == ()  # nothing was seen yet
    predictor.observe(0, (2, 3))
    assert predictor.predict(1, np.zeros(2)) == (2, 3)
    predictor.observe(1, (0, 1))
    assert predictor.predict(3, np.zeros(2)) == ()  # other experts, and no token before
    predictor.observe(3, (5, 4))
    assert predictor.predict(0, None) == (2, 3)  # of the token before
    predictor.observe(0, (1, 2))
    predictor.observe(1, (1, 3))
    assert predictor.predict(3, np.zeros(2)) == (5, 4)


def test_router_tables_that_are_not_listed_or_cut_short_are_refused(tmp_path):
    manifest = make_manifest((None,), routing="sparse")
    with pytest.raises(UserError, match="no router tables"):
        read_routers(tmp_path, manifest)
    (tmp_path / "r.bin").write_bytes(bytes(2 * EXPERTS * D - 1))
    facts = {"0": {"experts": EXPERTS, "k": K, "router": "r.bin"}}
    for files in ({}, {"r.bin": ""}):
        with pytest.raises(UserError, match="not sound"):
            read_routers(tmp_path, replace(manifest, moe=facts, files=files))


@given(n=st.integers(1, 100), buckets=st.sets(st.integers(1, 40), min_size=1, max_size=4))
def test_buckets_hold_every_token_once_and_are_the_smallest_that_do(n, buckets):
    group = Group((0,), "p", {bucket: str(bucket) for bucket in buckets})
    pieces = list(group.pieces(np.arange(n)))
    assert np.concatenate([piece for piece, _ in pieces]).tolist() == list(range(n))
    for piece, bucket in pieces:
        assert len(piece) <= bucket and not any(
            len(piece) <= smaller < bucket for smaller in buckets
        )


def test_an_expert_that_no_package_holds_is_an_error():
    decoder, manifest = Decoder((None,)), make_manifest((None,), routing="sparse", parts=1)
    shards = tuple(
        s if s.kind != "experts" else Shard(s.path, s.kind, s.layer, s.functions[:-2])
        for s in manifest.shards
    )
    object.__setattr__(manifest, "shards", shards)
    dispatch = dispatch_of(decoder, manifest)
    g = np.zeros((EXPERTS, 1), np.float16)
    g[EXPERTS - 1] = 1
    with pytest.raises(UserError, match=f"no package holds.*{EXPERTS - 1}"):
        dispatch.add(
            0,
            dispatch.chosen(0, g),
            np.zeros((D, 1), np.float16),
            g,
            np.zeros((D, 1), np.float32),
            CallClock(PhaseFigures()),
        )


@pytest.mark.parametrize("session", [{}, {"concurrency": 3}, {"predictor": "previous"}])
def test_a_function_that_cannot_be_loaded_is_an_error_and_not_a_gap(session):
    every = [f"expert_{e:03d}_t1" for e in range(EXPERTS)]
    _, broken = sparse(cache={"lacking": every}, session=session)
    for _ in range(2):
        with pytest.raises(UserError, match="no such function"):
            broken.decode(3)


@pytest.mark.parametrize("session", [{}, {"concurrency": 3}, {"predictor": "previous"}])
def test_a_cache_smaller_than_one_expert_is_an_error(session):
    with pytest.raises(UserError, match=r"smaller than one expert.*expert-cache-mb"):
        sparse(cache={"limit_bytes": 999}, session=session)[1].decode(3)


@pytest.mark.parametrize(
    "functions, message",
    [
        ([("a", 1, (0,)), ("b", 1, (1,)), ("c", 4, (1,))], "lacks an expert function"),
        ([("a", 1, (0, 1)), ("b", 1, (1,))], "do not fit together"),
        ([("shared_t1", 1)], "do not fit together"),
    ],
)
def test_a_package_whose_functions_do_not_match_its_experts_is_refused(functions, message):
    manifest = make_manifest((None,), routing="sparse")
    shard = Shard(
        "experts/layer_00.mlpackage", "experts", 0, tuple(expert_function(*f) for f in functions)
    )
    object.__setattr__(manifest, "shards", (shard,))
    with pytest.raises(UserError, match=message):
        expert_layers(manifest)


def test_senseless_options_are_refused():
    with pytest.raises(UserError, match="concurrency"):
        sparse(session={"concurrency": 0})
    with pytest.raises(UserError, match="unknown predictor"):
        sparse(session={"predictor": "oracle"})
