"""Windows of generated tokens that see all of the prompt too, against Hugging Face's own cache."""

import numpy as np
import torch

from ane_moe.loop import buffers
from ane_moe.loop.buffers import HIDDEN, Placement
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from tests.models import make_model, save_checkpoint
from tests.verification.tiny import tiny_conversion

PROMPT = np.random.default_rng(3).integers(3, 211, 20).tolist()
NEW = 8
COSINE = 0.9999


def seen(position: int, prompt: int | None, count: int = 1) -> list[list[int]]:
    """The tokens that each of `count` sees, with a window of 2."""
    mask = np.zeros((1, 1, count, 12), np.float16)
    buffers.RULES["mask"](mask, "mask.prompt_2", Placement(position, count, {}, prompt=prompt))
    return [np.flatnonzero(row != HIDDEN).tolist() for row in mask[0, 0]]


def test_a_prompt_sees_all_before_it_and_what_follows_sees_it_and_its_window() -> None:
    assert seen(2, None, count=2) == [[0, 1, 2], [0, 1, 2, 3]]
    assert seen(4, 4) == [[0, 1, 2, 3, 4]]
    assert seen(7, 4, count=2) == [[0, 1, 2, 3, 6, 7], [0, 1, 2, 3, 7, 8]]


def cosines(session: Session, expected: list[np.ndarray], ids: list[int]) -> list[float]:
    logits = [session.prefill(PROMPT).copy()]
    logits += [session.decode(identifier).copy() for identifier in ids[:-1]]
    norms = [np.linalg.norm(a) * np.linalg.norm(b) for a, b in zip(logits, expected, strict=True)]
    return [float(a @ b / norm) for a, b, norm in zip(logits, expected, norms, strict=True)]


def test_generated_tokens_see_what_hugging_face_shows_them(tmp_path) -> None:
    torch.set_num_threads(1)
    model = make_model("unlimited_ocr")
    checkpoint = save_checkpoint(model, tmp_path / "checkpoint")
    out = tiny_conversion(checkpoint, tmp_path / "out", prefill=16, context=64)
    with torch.no_grad():
        given = model.generate(
            torch.tensor([PROMPT]),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    ids = given.sequences[0, len(PROMPT) :].tolist()
    expected = [step[0].numpy() for step in given.logits]
    session = Session(load_shards(out, "reference"))
    assert min(cosines(session, expected, ids)) > COSINE
    session.reset()
    session.prompt = len(PROMPT) + NEW  # as if all were a prompt
    assert min(cosines(session, expected, ids)) < COSINE
