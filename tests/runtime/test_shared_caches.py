"""Layers that read the keys and values of another one (AFM), against the reference model and what is
published of its sizes."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from ane_moe.conversion.plan import ConvertOptions, sources_of
from ane_moe.conversion.planner import make_plan
from ane_moe.errors import UserError
from ane_moe.families import describe_config
from ane_moe.forecast.chips import Range, find_chip
from ane_moe.forecast.layer_kinds import plan_kinds
from ane_moe.forecast.lending_forms import lending_forms
from ane_moe.forecast.workload import workload_of_plan
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from ane_moe.manifest import TAIL, read_manifest
from ane_moe.mlprogram.reader import read_program
from ane_moe.model.spec import FROM_VALUES, InnerScale
from ane_moe.original.afm import AfmForCausalLM, in_8_bits
from ane_moe.runtime import open_package
from ane_moe.verification.verify import verify
from tests.forecast.hub_configs import AFM
from tests.models import make_model, save_checkpoint
from tests.verification.tiny import tiny_conversion

PARAMETERS = 3_111_368_064  # of an analysis of Apple's adapter toolkit: its frozen parameters
IDS = np.random.default_rng(5).integers(3, 211, 21).tolist()  # prefill calls of 16 and of 5 tokens
COSINE = 0.9995
LENDER, LAYERS = 4, 8


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    return make_model("afm")


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    return save_checkpoint(model, tmp_path_factory.mktemp("afm") / "checkpoint")


@pytest.fixture(scope="module")
def out(checkpoint, tmp_path_factory):
    """Core ML's states, but for the caches that other packages read."""
    folder = tmp_path_factory.mktemp("afm") / "out"
    return tiny_conversion(checkpoint, folder, prefill=16, context=64, golden=True)


@pytest.fixture(scope="module")
def shards(out):
    return load_shards(out, "reference")


@pytest.fixture(scope="module")
def expected(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].numpy()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a @ b) / np.linalg.norm(a) / np.linalg.norm(b))


# -- sizes, of the published configuration ---------------------------------------------------


def test_the_configuration_says_how_many_parameters_there_are() -> None:
    spec = describe_config(AFM)
    scales = {"k_scale.weight", "v_scale.weight"}
    tied = {"head.rows.weight"}
    own = (row for name, row in spec.weights() if row.path not in scales and str(name) not in tied)
    assert sum(math.prod(row.shape) for row in own) == PARAMETERS
    fields = {name: value for name, value in AFM.items() if name != "model_type"}
    with torch.device("meta"):
        reference = AfmForCausalLM(AfmForCausalLM.config_class(**fields))
    assert sum(one.numel() for one in reference.parameters()) == PARAMETERS


def cache_elements(reusing: int) -> int:
    """Of all caches of the published model, by what its packages keep."""
    spec = describe_config(AFM | {"num_kv_reuse_layers": reusing})
    plan = make_plan(spec, sources_of(spec), ConvertOptions(context=4096))
    return sum(math.prod(shape) for shard in plan.shards for shape in shard.states.values())


def test_caches_take_three_eighths_less_to_the_byte() -> None:
    assert cache_elements(0) == 117_440_512  # bytes, with 8 bits each
    assert cache_elements(21) == 73_400_320 == 117_440_512 * 5 // 8


def test_a_prompt_takes_37_percent_fewer_multiplications() -> None:
    spec = describe_config(AFM)
    kinds = plan_kinds(spec, ConvertOptions(context=4096))
    d, width, heads, kv_heads = 2048, 6656, 16 * 128, 2 * 128
    mlp, attention = 3 * d * width, 2 * d * heads
    tail, body = 21 * (mlp + attention), 35 * (mlp + attention + 2 * d * kv_heads)
    found = workload_of_plan(kinds.plan, kinds.repeats).tail_share
    assert found == pytest.approx(tail / (tail + body), abs=1e-4)  # norms beside it
    assert round(found, 3) == 0.37
    without = plan_kinds(spec, ConvertOptions(context=4096, prefill=0))
    assert workload_of_plan(without.plan, without.repeats).tail_share == 0


# -- packages --------------------------------------------------------------------------------


def test_caches_are_kept_once_and_read_by_name(out) -> None:
    """By the packages' own descriptions."""
    manifest, kept = read_manifest(out), 0
    for shard in manifest.shards:
        if shard.kind != "attn":
            continue
        function = open_package(out / shard.path, "reference").function(shard.functions[0].name)
        written = {feature.name.removesuffix("_out") for feature in function.outputs}
        inputs = [one for one in function.inputs if one.name in ("k_cache", "v_cache")]
        own = [*function.states, *(one for one in inputs if one.name in written)]
        kept += sum(math.prod(one.type.shape) for one in own)
        reads = shard.layer is not None and shard.layer > LENDER
        assert bool(own) != reads
        assert sorted(shard.borrowed) == (
            [f"state.{LENDER}.k_cache", f"state.{LENDER}.v_cache"] if reads else []
        )
    assert kept * LAYERS == LAYERS * 2 * 2 * 16 * 64 * (LENDER + 1)


def test_layers_that_read_have_no_weights_for_keys_and_values(out) -> None:
    for shard in read_manifest(out).shards:
        if shard.kind == "attn" and shard.layer is not None and shard.layer > LENDER:
            program = read_program(out / shard.path)
            (function,) = program.functions.values()
            names = {one.name for one in function.block.operations if "const" in one.type}
            assert any(name.startswith("w_q__") for name in names)
            assert not any(name.startswith(("w_k_", "w_v_")) for name in names)
            assert [function.name for function in shard.functions] == [TAIL]


def test_layers_without_the_one_that_they_read_are_refused(checkpoint, tmp_path) -> None:
    with pytest.raises(UserError, match=f"keys and values of layer {LENDER}"):
        tiny_conversion(checkpoint, tmp_path, layers=(0, 1, 6), context=64)


# -- what they compute -----------------------------------------------------------------------


def test_a_conversion_is_right(out) -> None:
    report = verify(out)
    assert report.failures == 0 and report.passed
    assert {row.function for row in report.models} == {"decode", "prefill"}
    assert {row.function for row in report.shards} == {"decode", "prefill", TAIL, "lookup"}


def test_a_quick_look_takes_along_the_layer_that_others_read(out) -> None:
    report = verify(out, quick=True)
    assert report.passed and LENDER in report.sample.layers


def test_the_tail_for_the_last_token_gives_what_all_layers_give(shards, expected) -> None:
    session = Session(shards)
    last = session.prefill(IDS).copy()
    assert cosine(last, expected[-1]) > COSINE
    tail = sum(shard.is_tail for shard in shards.manifest.shards)
    calls = session.figures.prefill.calls
    assert calls == 2 * (2 * LAYERS - tail) + tail + len(shards.head)  # of two chunks
    session.reset()
    each = session.prefill_logits(IDS)
    assert np.array_equal(each[-1], last)
    assert min(map(cosine, each, expected)) > COSINE


def test_a_step_with_shared_caches_is_what_is_computed_anew(shards, expected) -> None:
    session = Session(shards)
    session.prefill(IDS[:-3])
    steps = [session.decode(identifier).copy() for identifier in IDS[-3:]]
    for count, step in zip(range(len(IDS) - 3, len(IDS)), steps, strict=True):
        session.reset()
        anew = session.prefill(IDS[: count + 1])
        assert cosine(step, anew) > 0.9999
        assert cosine(step, expected[count]) > COSINE


def test_caches_hold_numbers_of_8_bits(shards, model) -> None:
    """In fp16: whole multiples of the layer's scale, some of them cut off."""
    session, attention = Session(shards), model.model.layers[LENDER].self_attn
    session.prefill(IDS)
    for name, scale in (
        ("k_cache", attention.quant_key_scale),
        ("v_cache", attention.quant_value_scale),
    ):
        codes = session._states.passed[f"state.{LENDER}.{name}"].astype(np.float32) / float(scale)
        assert np.abs(codes - codes.round()).max() < 0.1  # 128 times what fp16 rounds by
        assert codes.round().min() == -128 and codes.round().max() == 127


def test_a_wrong_cache_is_noticed(shards, expected) -> None:
    """Zeros in the lender's place: what the layers read is what it wrote."""
    session = Session(shards)
    session.prefill(IDS[:-1])
    for slot, value in session._states.passed.items():
        session._states.passed[slot] = np.zeros_like(value)
    assert cosine(session.decode(IDS[-1]), expected[-1]) < COSINE


# -- the reference model ---------------------------------------------------------------------


def test_numbers_are_rounded_to_the_nearest_of_256() -> None:
    found = in_8_bits(torch.tensor([0.26, 0.24, 1e3, -1e3]), torch.tensor([0.5]))
    assert found.tolist() == [0.5, 0.0, 63.5, -64.0]


@torch.no_grad()
def test_layers_read_the_last_ones_keys_and_values(model) -> None:
    """And of no other layer."""
    ids = torch.tensor([IDS])
    handed: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = [
        layer.register_forward_hook(lambda _, args, output: handed.append(output[1]))
        for layer in model.model.layers
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    assert all(one[0] is handed[LENDER][0] for one in handed[LENDER:])
    assert len({id(keys) for keys, _ in handed}) == LENDER + 1


def test_what_reads_values_undoes_what_they_were_multiplied_by() -> None:
    spec = replace(describe_config(AFM), inner={34: InnerScale(values=0.25), 40: InnerScale(0.5)})
    assert [spec.multiplier(FROM_VALUES, n) for n in (33, 34, 40)] == [1, 4, 4]


# -- several layers in a package -------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "together", "paths"),
    [
        ("mlstate", 4, ["stack/layer_00_to_03", "stack/layer_04_to_07"]),
        pytest.param(
            *("explicit", 4, ["stack/layer_00_to_03", "stack/layer_04_to_07"]),
            marks=pytest.mark.slow,
        ),
        ("mlstate", 3, ["stack/layer_00_to_02", "attn/layer_03", "attn/layer_04"]),
    ],
)
def test_layers_that_read_live_with_the_one_that_keeps(
    checkpoint, expected, tmp_path, state, together, paths
) -> None:
    """Where they fit; else they get its caches from the host, together or one by one."""
    options = {"state": state, "layers_per_shard": together, "prefill": 16, "context": 64}
    out = tiny_conversion(checkpoint, tmp_path, golden=True, **options)
    manifest = read_manifest(out)
    found = [shard.path.removesuffix(".mlpackage") for shard in manifest.shards]
    assert [path for path in found if "dense" not in path][: len(paths)] == paths
    alone = together > LAYERS - LENDER - 1
    assert manifest.lent.keys() == (
        set() if alone else {f"state.{LENDER}.k_cache", f"state.{LENDER}.v_cache"}
    )
    if state == "mlstate" and alone:
        function = open_package(out / manifest.shards[1].path, "reference").function("prefill")
        assert {one.name for one in function.states} == {"k_cache_0", "v_cache_0"}
        assert not {one.name for one in function.inputs} & {"k_cache", "v_cache"}
    assert verify(out).passed
    session = Session(load_shards(out, "reference"))
    assert cosine(session.prefill(IDS), expected[-1]) > COSINE


@pytest.fixture(scope="module", params=["mlstate", "explicit"])
def together(request, checkpoint, tmp_path_factory):
    """Layers 4 to 7 in one package."""
    folder = tmp_path_factory.mktemp("afm") / request.param
    options = {"state": request.param, "layers_per_shard": 4, "prefill": 16, "context": 64}
    return load_shards(tiny_conversion(checkpoint, folder, golden=True, **options), "reference")


def lending(shards):
    (loaded,) = [one for one in shards.loaded if one.shard.layer == LENDER]
    return loaded


def blob_places(operations) -> set[int]:
    """Where in the weight file the operations read."""
    inputs = (value for one in operations for own in one.inputs.values() for value in own)
    attributes = (value for one in operations for value in one.attributes.values())
    blobs = (getattr(value, "blob", None) for value in (*inputs, *attributes))
    return {blob[1] for blob in blobs if blob}


def test_one_package_has_a_tail_of_its_own(together) -> None:
    """By what the package itself has: prefill the weights of the layer that lends, and the tail
    those of the others, each once in the file."""
    shard = lending(together).shard
    assert [one.name for one in shard.functions] == ["decode", "prefill", TAIL]
    assert [one.layers for one in shard.functions] == [(), (4,), (5, 6, 7)]
    program = read_program(together.folder / shard.path)
    blocks = {name: function.block.operations for name, function in program.functions.items()}
    named = {
        name: {output.name for one in own for output in one.outputs} for name, own in blocks.items()
    }
    layers = {
        name: {one.split("__")[1] for one in own if one.startswith("w_layers__")}
        for name, own in named.items()
    }
    assert layers == {"decode": set("0123"), "prefill": {"0"}, TAIL: set("123")}
    places = {name: blob_places(own) for name, own in blocks.items()}
    assert places["decode"] == places["prefill"] | places[TAIL]
    assert places["prefill"] and places[TAIL] and not places["prefill"] & places[TAIL]
    first, *others = shard.functions
    assert sum(one.elements for one in others) == first.elements
    assert sum(one.weight_bytes for one in others) == first.weight_bytes == shard.weight_bytes


def test_the_tail_of_one_package_gives_what_all_layers_give(together, shards, expected) -> None:
    session = Session(together)
    last = session.prefill(IDS).copy()
    assert cosine(last, expected[-1]) > COSINE
    body = len(together.body)
    assert session.figures.prefill.calls == 2 * body + 1 + len(together.head)
    following = session.decode(7).copy()
    session.reset()
    each = session.prefill_logits(IDS)
    assert np.array_equal(each[-1], last)
    assert min(map(cosine, each, expected)) > COSINE
    assert np.array_equal(session.decode(7), following)
    by_ports = Session(shards)
    assert cosine(by_ports.prefill(IDS), last) > 0.9999
    assert cosine(by_ports.decode(7), following) > 0.9999


def test_one_package_with_a_tail_is_right(together) -> None:
    report = verify(together.folder)
    assert report.failures == 0 and report.passed
    path = lending(together).shard.path
    found = {row.function for row in report.shards if row.path == path}
    assert found == {"decode", "prefill", TAIL}


def test_the_tail_reads_what_prefill_of_its_package_has_kept(together, expected) -> None:
    """With zeros in their place, or the caches of another text, it is noticed."""
    shard = lending(together).shard
    other = Session(together)
    other.prefill([3] * len(IDS))
    for forgets in (True, False):
        session = Session(together)
        states = session._states
        session._place(session._prefill, session._rows(IDS[:16]), 0)
        session._run(session._prefill, session._prefill_clock)
        session.position = 16
        if shard.path in states.held:
            fresh = lending(together).functions["decode"].make_state()
            states.held[shard.path] = fresh if forgets else other._states.held[shard.path]
        else:
            for slot in shard.states:
                value = np.zeros_like(states.passed[slot])
                states.passed[slot] = value if forgets else other._states.passed[slot]
        session._head_of(session._prefill, 15, session._prefill_clock)
        assert cosine(session._view, expected[15]) < COSINE


def test_without_prefill_there_is_no_tail(checkpoint, tmp_path) -> None:
    options = {"layers_per_shard": 4, "prefill": 0, "context": 64}
    out = tiny_conversion(checkpoint, tmp_path, **options)
    (shard,) = [one for one in read_manifest(out).shards if one.layer == LENDER]
    assert [one.name for one in shard.functions] == ["decode"]


# -- which form --------------------------------------------------------------------------------


def test_the_forecast_says_which_form_to_take() -> None:
    """Of the published model: fewer calls, where one package may be as large as its layers."""
    spec, chip = describe_config(AFM), find_chip("m4-max")
    small = lending_forms(spec, ConvertOptions(context=4096), chip)
    large = lending_forms(spec, ConvertOptions(context=4096, max_shard_mb=1200), chip)
    assert small is not None and large is not None
    assert small.layers == tuple(range(34, 56)) and small.ports.packages == 44
    assert small.together == large.together and small.together.packages == 1
    assert small.together.decode_ms.expected < small.ports.decode_ms.expected
    assert small.best is small.ports and large.best is large.together
    assert "take ports (--layers-per-shard 1)" in small.sentence
    assert "--max-shard-mb is 220" in small.sentence
    assert "take one package (--layers-per-shard 22)" in large.sentence
    slower = replace(large, together=replace(large.together, decode_ms=Range(1e3, 1e3, 1e3)))
    assert slower.best is slower.ports  # the rule is of the prediction
    assert (
        lending_forms(describe_config(AFM | {"num_kv_reuse_layers": 0}), ConvertOptions(), chip)
        is None
    )


def test_one_package_saves_the_same_part_of_a_prompt() -> None:
    """By its own functions: what the tail leaves out, and what all of them read of caches."""
    spec = describe_config(AFM)
    options = ConvertOptions(context=4096, layers_per_shard=22, max_shard_mb=2000)
    found = workload_of_plan(make_plan(spec, sources_of(spec), options))
    kinds = plan_kinds(spec, ConvertOptions(context=4096))
    ports = workload_of_plan(kinds.plan, kinds.repeats)
    assert found.tail_share == pytest.approx(ports.tail_share, abs=1e-6)
    assert found.cache_bytes == ports.cache_bytes
    for of in ("decode", "tail"):
        read, expected = (
            sum(call.count.expected * call.cache_bytes for call in getattr(one, of))
            for one in (found, ports)
        )
        assert read == expected
