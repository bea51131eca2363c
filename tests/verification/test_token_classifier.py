"""An encoder that labels tokens, whole: windows of fixed lengths, no cache, a band of its own call
to attend to."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from ane_moe.errors import UserError
from ane_moe.formats.recipe import find_recipe
from ane_moe.loop.labels import Labeller
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from ane_moe.model.spec import Clamp, ModelSpec
from ane_moe.verification.verify import verify
from tests.models import CONFIGS, make_model, save_checkpoint
from tests.verification.test_other_shapes import (
    Change,
    coarser_norm,
    of_mixer,
    of_router,
    one_more,
    roll,
    turned_faster,
)
from tests.verification.tiny import describe_wrongly, edit_tensors, tiny_conversion

FAMILY = "openai_privacy_filter"
REACH = CONFIGS[FAMILY]["sliding_window"]
COSINE = 0.9999
LENGTHS = (12, 32)
# One that fills each length, one whose band reaches over neither edge, one token alone.
COUNTS = (32, 12, 2 * REACH + 9, 1)
PROMPTS = [np.random.default_rng(n).integers(3, 211, n).tolist() for n in COUNTS]
WAYS: dict[str, dict[str, Any]] = {
    "masked": {},
    "masked, tokens first": {"layout": "bct1"},
    "sparse": {"routing": "sparse", "expert_tokens": (1, 4)},
    "sparse, pairs": {"routing": "sparse", "experts_per_function": 2},
    "cut": {"max_shard_mb": 0.06},
    "stacked": {"layers_per_shard": 2, "max_shard_mb": 100},
    "int8": {"recipe": find_recipe("int8")},
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.set_num_threads(1)
    return make_model(FAMILY, num_hidden_layers=2)


@pytest.fixture(scope="module")
def checkpoint(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(model, tmp_path_factory.mktemp(FAMILY))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.json"
    path.write_text(str(PROMPTS))
    return path


@pytest.fixture(scope="module")
def labeller(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Labeller:
    out = tiny_conversion(checkpoint, tmp_path_factory.mktemp("out"), lengths=LENGTHS)
    return Labeller(load_shards(out, "reference"))


def expected_logits(model: PreTrainedModel, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor([ids])).logits[0].numpy()
    return logits


def cosines(logits: np.ndarray, expected: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(logits, axis=1) * np.linalg.norm(expected, axis=1)
    found: np.ndarray = (logits * expected).sum(1) / norms
    return found


@pytest.mark.parametrize("way", WAYS)
def test_every_function_and_the_whole_model_compute_what_hugging_face_does(
    way: str, checkpoint: Path, model: PreTrainedModel, prompts: Path, tmp_path: Path
) -> None:
    out = tiny_conversion(checkpoint, tmp_path / "out", lengths=LENGTHS, **WAYS[way])
    report = verify(out, checkpoint=checkpoint, prompts=prompts)
    assert report.passed
    for routing in report.routing:  # all that differ do so at a near tie
        assert routing.near_tie_flips == pytest.approx((1 - routing.set_agreement) * routing.tokens)
    assert [(row.function, row.tokens) for row in report.models] == [
        ("length_12", 13),
        ("length_32", sum(COUNTS)),
    ]
    assert all(row.label_agreement is not None for row in report.models)
    if way == "int8":
        return
    labels = Labeller(load_shards(out, "reference"))
    assert labels.labels == tuple(f"label-{number}" for number in range(7))
    for ids in PROMPTS:
        for length in (length for length in LENGTHS if length >= len(ids)):
            near = cosines(labels.logits(ids, length), expected_logits(model, ids))
            # A token that is routed otherwise at a near tie differs, and no other.
            assert np.quantile(near, 0.1) > COSINE


def test_what_a_length_pads_changes_no_score(labeller: Labeller) -> None:
    for count in (1, 5, 12):
        short, long = (labeller.logits(PROMPTS[0][:count], length) for length in LENGTHS)
        np.testing.assert_allclose(short, long, atol=4e-3)
        assert np.array_equal(labeller.logits(PROMPTS[0][:count]), short)


def test_texts_that_share_a_call_have_the_scores_of_each_alone(
    labeller: Labeller, model: PreTrainedModel
) -> None:
    texts = [PROMPTS[0][:9], PROMPTS[1][:1], PROMPTS[2][:14], PROMPTS[0][10:18]]
    found = np.split(labeller.packed(texts), np.cumsum([len(ids) for ids in texts])[:-1])
    for ids, scores in zip(texts, found, strict=True):
        np.testing.assert_allclose(scores, labeller.logits(ids), atol=4e-3)
        assert np.quantile(cosines(scores, expected_logits(model, ids)), 0.1) > COSINE
    joined = labeller.logits([one for ids in texts for one in ids])
    assert np.abs(joined[:9] - found[0]).max() > 0.05  # in one text they would see each other
    with pytest.raises(UserError, match="33 tokens"):
        labeller.packed([[3] * 20, [3] * 13])


def test_a_window_leaves_nothing_to_the_next(labeller: Labeller) -> None:
    first = labeller.logits(PROMPTS[1])
    labeller.logits(PROMPTS[0][:12])
    labeller.logits(PROMPTS[0])
    assert np.array_equal(labeller.logits(PROMPTS[1]), first)


def test_scores_depend_on_the_band_of_every_layer_and_on_nothing_else(
    labeller: Labeller, model: PreTrainedModel
) -> None:
    """Tokens as far as `context_each_side` change a score, in Hugging Face's model too; those
    beyond do not."""
    side = labeller.context_each_side
    assert side == 2 * REACH
    ids = PROMPTS[0]
    for far, changes in ((side, True), (side + 1, False)):
        middle = 15
        other = list(ids)
        other[middle + far] = other[middle - far] = (ids[middle] + 7) % 211
        ours = [labeller.logits(one)[middle] for one in (ids, other)]
        theirs = [expected_logits(model, one)[middle] for one in (ids, other)]
        assert np.array_equal(*ours) != changes
        assert np.array_equal(*theirs) != changes


def test_windows_with_as_much_context_have_the_scores_of_the_whole(labeller: Labeller) -> None:
    ids, side = PROMPTS[0], labeller.context_each_side
    whole = labeller.logits(ids)
    for first in range(len(ids) - side):
        near = labeller.logits(ids[first : first + 2 * side + 1])
        place = side if first else 0
        np.testing.assert_allclose(near[place], whole[first + place], atol=4e-3)


@pytest.mark.parametrize(
    ("ids", "length", "said"),
    [
        ([], None, "do not fit"),
        ([3] * 33, None, "33 tokens"),
        ([3] * 13, 12, "13 tokens"),
        ([3, 211], None, "211"),
        ([3, -1], None, "-1"),
        ([3], 16, "no functions for 16"),
    ],
)
def test_what_no_window_takes_is_refused(
    labeller: Labeller, ids: list[int], length: int | None, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        labeller.logits(ids, length)


def test_an_encoder_generates_nothing_and_a_decoder_labels_nothing(
    labeller: Labeller, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="generates none"):
        Session(labeller.shards)
    text = save_checkpoint(make_model("mixtral", num_hidden_layers=1), tmp_path / "checkpoint")
    with pytest.raises(UserError, match="no labels"):
        Labeller(load_shards(tiny_conversion(text, tmp_path / "out", context=32), "reference"))
    with pytest.raises(UserError, match="leave --lengths out"):
        tiny_conversion(text, tmp_path / "other", lengths=(8,))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lengths": ()}, "none"),
        ({"lengths": (8, 4)}, "8,4"),
        ({"lengths": (0, 4)}, "0,4"),
        ({"lengths": (4, 4)}, "4,4"),
        ({"lengths": (257,)}, "1 to 256"),
        ({"context": 64}, "give --lengths"),
    ],
)
def test_impossible_lengths_are_refused(
    options: dict[str, Any], said: str, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        tiny_conversion(checkpoint, tmp_path / "out", **options)


def of_expert(**changes: Any) -> Change:
    def change(spec: ModelSpec) -> ModelSpec:
        layers = tuple(
            dataclasses.replace(
                layer,
                ffn=dataclasses.replace(
                    layer.ffn, expert=dataclasses.replace(layer.ffn.expert, **changes)
                ),
            )
            for layer in spec.layers
        )
        return dataclasses.replace(spec, layers=layers)

    return change


def of_head(**changes: Any) -> Change:
    def change(spec: ModelSpec) -> ModelSpec:
        return dataclasses.replace(spec, head=dataclasses.replace(spec.head, **changes))

    return change


def without_factor(spec: ModelSpec) -> ModelSpec:
    ropes = {
        name: dataclasses.replace(rope, attention_factor=1.0) for name, rope in spec.ropes.items()
    }
    return dataclasses.replace(spec, ropes=ropes)


MUTATIONS: dict[str, tuple[Change, str]] = {
    "scale": (of_mixer(scale=0.5), "attn"),
    "reach one less": (of_mixer(reach=REACH - 1), "attn"),
    "reach one more": (of_mixer(reach=REACH + 1), "attn"),
    "sinks": (of_mixer(sinks=False), "attn"),
    "qkv_bias": (of_mixer(qkv_bias=False), "attn"),
    "o_bias": (of_mixer(o_bias=False), "attn"),
    "rope": (turned_faster, "attn"),
    "attention_factor": (without_factor, "attn"),
    "norm": (coarser_norm, "attn"),
    "logit_bias": (of_router(logit_bias=False), "moe"),
    "renorm": (of_router(renorm=False), "moe"),
    "k": (of_router(k=2), "moe"),
    "clamp": (of_expert(clamp=None), "moe"),
    "limit": (of_expert(clamp=Clamp(0.9, 1.3)), "moe"),
    "alpha": (of_expert(clamp=Clamp(0.7, 1.0)), "moe"),
    "bias of experts": (of_expert(bias=False), "moe"),
    "bias of the head": (of_head(bias=False), "labels"),
}


@pytest.mark.parametrize("field", MUTATIONS)
def test_a_wrong_field_of_the_spec_fails(
    field: str,
    checkpoint: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    change, kind = MUTATIONS[field]

    with monkeypatch.context() as patch:
        describe_wrongly(patch, change)
        out = tiny_conversion(checkpoint, tmp_path / "out", lengths=(32,))
    report = verify(out, checkpoint=checkpoint, prompts=prompts)
    assert not report.passed
    assert kind in {row.kind for row in report.shards if not row.passed}


def neighbours_parted(tensors: dict[str, torch.Tensor]) -> None:
    """Query rows in the order in which pairs are halves apart."""
    for name in tensors:
        if name.endswith("q_proj.weight"):
            heads = tensors[name].reshape(-1, 8, 2, tensors[name].shape[-1])
            tensors[name] = heads.transpose(1, 2).reshape(tensors[name].shape)


def ends_exchanged(ending: str) -> Callable[[dict[str, torch.Tensor]], None]:
    """Gate and up of every expert in each other's place."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith(ending):
                tensors[name] = torch.cat(tensors[name].chunk(2, -1)[::-1], -1)

    return edit


@pytest.mark.parametrize(
    ("edit", "kind"),
    [
        (roll("sinks"), "attn"),
        (neighbours_parted, "attn"),
        (one_more("k_proj.bias"), "attn"),
        (roll("router.bias"), "moe"),
        (ends_exchanged("gate_up_proj"), "moe"),
        (ends_exchanged("gate_up_proj_bias"), "moe"),
        (one_more("down_proj_bias"), "moe"),
        (roll("score.bias"), "labels"),
    ],
    ids=lambda value: getattr(value, "__qualname__", str(value)),
)
def test_a_wrong_tensor_fails(
    edit: Callable[[dict[str, torch.Tensor]], None],
    kind: str,
    checkpoint: Path,
    model: PreTrainedModel,
    prompts: Path,
    tmp_path: Path,
) -> None:
    wrong = save_checkpoint(model, tmp_path / "wrong")
    edit_tensors(wrong, edit)
    out = tiny_conversion(wrong, tmp_path / "out", lengths=(32,))
    report = verify(out, checkpoint=checkpoint, prompts=prompts)
    assert kind in {row.kind for row in report.shards if not row.passed}
