"""Families that are not shaped like Llama, whole: state that convolutions keep, state that routers
hand on."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ane_moe.formats.recipe import FP16
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from ane_moe.model.spec import ModelSpec
from ane_moe.verification.result import VerifyReport
from ane_moe.verification.verify import verify
from tests.models import make_model, read_config, save_checkpoint
from tests.slow_set import slow_but
from tests.verification.tiny import describe_wrongly, edit_tensors, tiny_conversion

COSINE = 0.9999
# Prompts of more than two prefill chunks, the last one padded: kept tokens cross both.
PROMPTS = [
    np.random.default_rng(seed).integers(3, 211, length).tolist()
    for seed, length in enumerate((41, 19))
]
WAYS: dict[str, dict[str, Any]] = {
    "masked": {},
    "masked, explicit, tokens first": {"state": "explicit", "layout": "bct1"},
    "sparse": {"routing": "sparse", "expert_tokens": (1, 4)},
    "sparse, explicit, pairs": {
        "routing": "sparse",
        "state": "explicit",
        "experts_per_function": 2,
    },
    "cut": {"max_shard_mb": 0.03},
    "stacked": {"layers_per_shard": 4, "max_shard_mb": 100},
}


@pytest.fixture(scope="module", params=["lfm2_moe", "zaya"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_checkpoint(make_model(request.param), tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.json"
    path.write_text(str(PROMPTS))
    return path


def proved(checkpoint: Path, out: Path, prompts: Path, **options: Any) -> VerifyReport:
    tiny_conversion(checkpoint, out, prefill=16, context=96, **options)
    return verify(out, checkpoint=checkpoint, prompts=prompts)


# Sparse routing of many other parts is tried with states elsewhere.
@pytest.mark.parametrize("way", slow_but(WAYS.keys() - {"sparse"}, WAYS))
def test_every_function_and_the_whole_model_compute_what_hugging_face_does(
    way: str, checkpoint: Path, prompts: Path, tmp_path: Path
) -> None:
    report = proved(checkpoint, tmp_path / "out", prompts, **WAYS[way])
    assert report.passed
    for routing in report.routing:  # all that differ do so at a near tie
        assert routing.near_tie_flips == pytest.approx((1 - routing.set_agreement) * routing.tokens)
    session = Session(load_shards(tmp_path / "out", "reference"))
    # Made anew and not read: ZAYA's `from_pretrained` sets the skip class's stored bias to -1.
    model = make_model(read_config(checkpoint)["model_type"])
    for ids in PROMPTS:
        session.reset()
        logits = session.prefill_logits(ids)
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0].numpy()
        norms = np.linalg.norm(logits, axis=1) * np.linalg.norm(expected, axis=1)
        # A token that is routed otherwise at a near tie differs, and no other.
        assert np.quantile((logits * expected).sum(1) / norms, 0.1) > COSINE


def test_decode_after_prefill_goes_on_where_it_stopped(checkpoint: Path, tmp_path: Path) -> None:
    """Chunks of every size up to the whole give one answer."""
    out = tiny_conversion(checkpoint, tmp_path / "out", prefill=16, context=96)
    shards, ids = load_shards(out, "reference"), PROMPTS[0]
    whole = Session(shards).prefill_logits(ids)
    for cut in (1, 15, 16, 17, 33):
        session = Session(shards)
        session.prefill(ids[:cut])
        rest = session.prefill_logits(ids[cut:], by="decode")
        np.testing.assert_allclose(rest, whole[cut:], atol=3e-2)


def test_a_reset_forgets_what_convolutions_kept(checkpoint: Path, tmp_path: Path) -> None:
    out = tiny_conversion(checkpoint, tmp_path / "out", prefill=16, context=96)
    session = Session(load_shards(out, "reference"))
    first = session.prefill(PROMPTS[0]).copy()
    session.reset()
    session.prefill(PROMPTS[1])
    session.reset()
    assert np.array_equal(session.prefill(PROMPTS[0]), first)


LAYERS = {"lfm2_moe": 2, "zaya": 3}  # enough to have every part
Change = Callable[[ModelSpec], ModelSpec]


def of_mixer(**changes: Any) -> Change:
    """Every mixer that has the fields."""

    def change(spec: ModelSpec) -> ModelSpec:
        layers = (
            dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, **changes))
            if all(hasattr(layer.mixer, name) for name in changes)
            else layer
            for layer in spec.layers
        )
        return dataclasses.replace(spec, layers=tuple(layers))

    return change


def of_router(**changes: Any) -> Change:
    def routed(ffn: Any) -> Any:
        return dataclasses.replace(ffn, router=dataclasses.replace(ffn.router, **changes))

    def change(spec: ModelSpec) -> ModelSpec:
        layers = (
            dataclasses.replace(layer, ffn=routed(layer.ffn))
            if hasattr(layer.ffn, "router")
            else layer
            for layer in spec.layers
        )
        return dataclasses.replace(spec, layers=tuple(layers))

    return change


def of_layer(**changes: Any) -> Change:
    def change(spec: ModelSpec) -> ModelSpec:
        layers = tuple(dataclasses.replace(layer, **changes) for layer in spec.layers)
        return dataclasses.replace(spec, layers=layers)

    return change


def of_model(**changes: Any) -> Change:
    return lambda spec: dataclasses.replace(spec, **changes)


def turned_faster(spec: ModelSpec) -> ModelSpec:
    ropes = {
        name: dataclasses.replace(rope, inv_freq=tuple(1.3 * f for f in rope.inv_freq))
        for name, rope in spec.ropes.items()
    }
    return dataclasses.replace(spec, ropes=ropes)


def coarser_norm(spec: ModelSpec) -> ModelSpec:
    return dataclasses.replace(spec, norm=dataclasses.replace(spec.norm, eps=0.3))


MUTATIONS: dict[str, dict[str, tuple[Change, str]]] = {
    "zaya": {
        "scale": (of_mixer(scale=0.5), "attn"),
        "window": (of_mixer(window=3), "attn"),
        "rope": (turned_faster, "attn"),
        "norm": (coarser_norm, "attn"),
        "affine": (of_layer(affine=False), "attn"),
        "entry": (of_layer(entry=False), "attn"),
        "takes": (of_router(takes=False), "moe"),
        "eps of the router": (of_router(eps=50.0), "moe"),
        "k": (of_router(k=2), "moe"),
    },
    "lfm2_moe": {
        "scale": (of_mixer(scale=0.5, qk_norm_eps=1e-5), "attn"),
        "qk_norm": (of_mixer(qk_norm="none"), "attn"),
        "rope": (turned_faster, "attn"),
        "norm": (coarser_norm, "attn"),
        "score": (of_router(score="softmax"), "moe"),
        "bias": (of_router(bias=False), "moe"),
        "renorm": (of_router(renorm=False), "moe"),
        "renorm_eps": (of_router(renorm_eps=0.3), "moe"),
        "routed scale": (of_router(scale=1.0), "moe"),
        "k": (of_router(k=2), "moe"),
    },
}


@pytest.mark.parametrize(
    ("family", "field"), [(family, field) for family in MUTATIONS for field in MUTATIONS[family]]
)
def test_a_wrong_field_of_the_spec_fails(
    family: str, field: str, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, kind = MUTATIONS[family][field]
    true = save_checkpoint(make_model(family, num_hidden_layers=LAYERS[family]), tmp_path / "true")

    with monkeypatch.context() as patch:
        describe_wrongly(patch, change)
        tiny_conversion(true, tmp_path / "out", prefill=16, context=96)
    report = verify(tmp_path / "out", checkpoint=true, prompts=prompts)
    assert not report.passed
    assert kind in {row.kind for row in report.shards if not row.passed}


def roll(ending: str) -> Callable[[dict[str, torch.Tensor]], None]:
    """Turn every tensor whose name ends so by one place."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        names = [name for name in tensors if name.endswith(ending)]
        assert names
        for name in names:
            tensors[name] = tensors[name].roll(1, -1)

    return edit


def one_more(ending: str) -> Callable[[dict[str, torch.Tensor]], None]:
    """Add 1 to every other element of tensors whose name ends so."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith(ending):
                tensors[name][::2] += 1

    return edit


def both_taps_exchanged(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        if name.endswith("conv_qk_depthwise.weight"):
            tensors[name] = tensors[name].flip(-1)


@pytest.mark.parametrize(
    ("family", "edit", "kind"),
    [
        ("zaya", roll("qk_norm.temp"), "attn"),
        ("zaya", both_taps_exchanged, "attn"),
        ("zaya", roll("conv_qk_grouped.weight"), "attn"),
        ("zaya", one_more("conv_qk_grouped.bias"), "attn"),
        ("zaya", roll("v_proj_delayed.weight"), "attn"),
        ("zaya", roll("gate.balancing_biases"), "moe"),
        ("zaya", roll("gate.router_states_scale"), "moe"),
        ("zaya", roll("post_mlp_residual_scale.residual_bias"), "moe"),
        ("lfm2_moe", roll("conv.conv.weight"), "attn"),
        ("lfm2_moe", roll("conv.in_proj.weight"), "attn"),
        ("lfm2_moe", roll("feed_forward.expert_bias"), "moe"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_wrong_tensor_fails(
    family: str,
    edit: Callable[[dict[str, torch.Tensor]], None],
    kind: str,
    prompts: Path,
    tmp_path: Path,
) -> None:
    true = save_checkpoint(make_model(family, num_hidden_layers=LAYERS[family]), tmp_path / "true")
    wrong = save_checkpoint(
        make_model(family, num_hidden_layers=LAYERS[family]), tmp_path / "wrong"
    )
    edit_tensors(wrong, edit)
    tiny_conversion(wrong, tmp_path / "out", prefill=16, context=96, recipe=FP16)
    report = verify(tmp_path / "out", checkpoint=true, prompts=prompts)
    assert kind in {row.kind for row in report.shards if not row.passed}
