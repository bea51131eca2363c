"""Whole conversions of families of known parts in fp16, proved by `verify`, and the ids that Hugging
Face's own generate chooses."""

import numpy as np
import pytest
import torch

from ane_moe.loop.generation import GenerateOptions, generate
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from ane_moe.verification.verify import verify
from tests.models import DECODERS, make_model, save_checkpoint
from tests.verification.tiny import tiny_conversion
from tests.zoo import ROWS

NEW_TOKENS = 4
MARGIN = 1e-2  # where HF's best two logits are closer, fp16 may choose the other
COSINE = 0.9999
PROMPTS = [np.random.default_rng(seed).integers(3, 211, 30).tolist() for seed in (0, 1)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=ROWS)
def original(request, tmp_path_factory):
    """A family's model, and its checkpoint with prompts beside it."""
    model = make_model(request.param, seed=ROWS[request.param].seed)
    folder = save_checkpoint(model, tmp_path_factory.mktemp(request.param) / "checkpoint")
    (folder.parent / "prompts.json").write_text(str(PROMPTS))
    return model, folder


# Other tests convert every kind of part for sparse routing, and experts of every kind for stream.
SLOW = [pytest.param(routing, marks=pytest.mark.slow) for routing in ("sparse", "stream")]


@pytest.mark.parametrize("routing", ["masked", *SLOW])
def test_a_conversion_is_right(original, routing, tmp_path):
    model, checkpoint = original
    options = {"expert_tokens": (1, 16)} if routing != "masked" else {}
    out = tiny_conversion(checkpoint, tmp_path, routing=routing, prefill=16, context=64, **options)
    report = verify(out, checkpoint=checkpoint, prompts=checkpoint.parent / "prompts.json")
    assert not report.integrity
    assert [row for row in report.shards if not row.passed] == []
    assert {row.function for row in report.models} == {"decode", "prefill"}
    for row in report.routing:
        assert row.set_agreement == 1 or row.near_tie_flips
    assert all(row.passed for row in report.models)
    shards = load_shards(out, "reference")
    assert_logits_agree(model, Session(shards))
    if routing == "masked":
        assert_greedy_ids_agree(model, Session(shards))


# Texts by seed, where two experts of HF's own compete within 1e-3 on the usual one: fp16 may choose
# the other.
TEXTS = {"glm4_moe": 3, "kolibri1": 4, "qwen3_next": 3}
USUAL = 2
LONG, NEW_IDS = 100, 32


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["masked", "sparse"])
@pytest.mark.parametrize("family", [*ROWS, *DECODERS])
def test_after_a_long_text_the_greedy_ids_are_hugging_faces(family, routing, tmp_path):
    """Its own ids are taken in whatever ours are, so that each is compared: whether the text came
    by calls of many tokens or of one."""
    model = make_model(family, seed=ROWS[family].seed if family in ROWS else 0)
    checkpoint = save_checkpoint(model, tmp_path / "checkpoint")
    options = {"expert_tokens": (1, 16)} if routing == "sparse" else {}
    context = LONG + NEW_IDS
    out = tiny_conversion(
        checkpoint, tmp_path / "out", routing=routing, prefill=16, context=context, **options
    )
    text = np.random.default_rng(TEXTS.get(family, USUAL)).integers(3, 211, LONG).tolist()
    ids, decided = greedy_ids(model, text, NEW_IDS)
    assert decided.sum() >= NEW_IDS / 2
    shards = load_shards(out, "reference")
    for by in ("prefill", "decode"):
        session = Session(shards)
        logits = [session.prefill_logits(text, by)[-1]]
        session.prompt = LONG
        logits += [session.decode(identifier).copy() for identifier in ids[:-1]]
        ours = np.argmax(logits, axis=1)
        assert np.array_equal(ours[decided], ids[decided]), by


@pytest.mark.parametrize("way", [{"max_shard_mb": 0.03}, {"layers_per_shard": 2}], ids=str)
def test_what_stands_beside_experts_is_right_in_other_cuts(way, tmp_path):
    model = make_model("gemma4_text")
    checkpoint = save_checkpoint(model, tmp_path / "checkpoint")
    (tmp_path / "prompts.json").write_text(str(PROMPTS))
    out = tiny_conversion(checkpoint, tmp_path / "out", prefill=16, context=64, **way)
    assert verify(out, checkpoint=checkpoint, prompts=tmp_path / "prompts.json").passed
    assert_logits_agree(model, Session(load_shards(out, "reference")))


def assert_logits_agree(model, session):
    """The median over tokens, since a near tie in routing flips a few."""
    with torch.no_grad():
        expected = model(torch.tensor(PROMPTS[:1])).logits[0].numpy()
    logits = session.prefill_logits(PROMPTS[0])
    norms = np.linalg.norm(logits, axis=1) * np.linalg.norm(expected, axis=1)
    assert np.median((logits * expected).sum(1) / norms) > COSINE


def assert_greedy_ids_agree(model, session):
    """Up to the first place where HF itself is nearly undecided."""
    expected, decided = greedy_ids(model, PROMPTS[0], NEW_TOKENS)
    first = int(np.argmin(np.append(decided, False)))
    generation = generate(session, PROMPTS[0], GenerateOptions(max_tokens=NEW_TOKENS))
    ids = [piece.id for piece in generation]
    assert first >= 1 and ids[:first] == expected[:first].tolist()


def greedy_ids(model, text, count):
    """What HF's own generate chooses after a text, and whether it is decided there."""
    with torch.no_grad():
        generated = model.generate(
            torch.tensor([text]),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=-1,
            output_logits=True,
            return_dict_in_generate=True,
        )
    best = torch.topk(torch.cat(generated.logits), 2).values.numpy()
    return generated.sequences[0, len(text) :].numpy(), best[:, 0] - best[:, 1] > MARGIN
