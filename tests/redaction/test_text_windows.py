"""Labels of a long text do not depend on where its windows are cut."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ane_moe.redaction.viterbi import Decoder
from ane_moe.redaction.windows import is_exact, plan_windows, scores_of, scores_of_all
from tests.redaction.scorers import Banded, HuggingFace, tiny_model

LONG = 5000  # tokens
ROUNDING = 5e-3  # of fp32: rotary angles are of absolute positions


def ids_of(count, vocab=300, seed=1):
    return np.random.default_rng(seed).integers(0, vocab, count).tolist()


@given(st.integers(0, 700), st.integers(1, 96), st.integers(0, 60))
@settings(deadline=None)
def test_kept_parts_join_and_windows_fit(count, length, context):
    windows = plan_windows(count, length, context)
    kept = [(one.kept_first, one.kept_last) for one in windows]
    joined = [place for first, last in kept for place in range(first, last)]
    assert joined == list(range(count))
    for one in windows:
        assert 0 <= one.first <= one.kept_first < one.kept_last <= one.last <= count
        assert one.last - one.first <= length


@given(st.integers(1, 3000), st.integers(1, 300), st.integers(0, 140))
@settings(deadline=None)
def test_tokens_have_their_context_or_the_texts_end(count, length, context):
    if length - 2 * context < max(1, length // 8):
        return
    for one in plan_windows(count, length, context):
        assert one.first == 0 or one.kept_first - one.first >= context
        assert one.last == count or one.last - one.kept_last >= context


@pytest.mark.parametrize("offset", range(40))
def test_scores_of_a_long_text_are_those_of_the_whole_at_every_offset(offset):
    scorer, ids = Banded(), ids_of(LONG)[offset:]
    assert is_exact(scorer)
    assert np.array_equal(scores_of(scorer, ids), scorer.whole(ids))
    assert max(scorer.calls) == 64 and len(scorer.calls) > LONG / 64


@pytest.mark.parametrize("missing", [1, 2])
def test_a_token_less_of_context_changes_scores_at_a_seam(missing):
    scorer, ids = Banded(), ids_of(LONG)
    scorer.context_each_side -= missing
    assert not np.array_equal(scores_of(scorer, ids), scorer.whole(ids))


@pytest.mark.parametrize("offset", [0, 7, 13])
def test_labels_of_hugging_faces_model_do_not_change_at_a_seam(offset):
    scorer, ids = HuggingFace(tiny_model(), 64), ids_of(LONG // 5)[offset:]
    whole, found = scorer.whole(ids), scores_of(scorer, ids)
    decoder = Decoder(scorer.labels)
    assert np.abs(whole - found).max() < ROUNDING
    assert np.array_equal(decoder.decode(whole), decoder.decode(found))


def test_hugging_faces_labels_do_change_where_the_context_is_too_short():
    scorer, ids = HuggingFace(tiny_model(), 64), ids_of(LONG // 5)
    scorer.context_each_side = 2
    assert np.abs(scores_of(scorer, ids) - scorer.whole(ids)).max() > 20 * ROUNDING


def test_five_thousand_tokens_of_hugging_faces_model():
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    scorer, ids = HuggingFace(tiny_model(**small), 256), ids_of(LONG)
    decoder = Decoder(scorer.labels)
    whole, found = scorer.whole(ids), scores_of(scorer, ids)
    assert np.array_equal(decoder.decode(whole), decoder.decode(found))
    assert len(np.unique(decoder.decode(whole))) > 10


def test_functions_too_short_for_the_context_say_so_and_cover_the_text():
    scorer, ids = Banded(lengths=(16,), band=128, depth=8), ids_of(200)
    assert not is_exact(scorer)
    assert scores_of(scorer, ids).shape == (200, 33)


@given(st.lists(st.integers(0, 90), max_size=30))
@settings(deadline=None)
def test_short_texts_share_windows_and_keep_their_order(counts):
    scorer = Banded()
    texts = [ids_of(count, seed=number) for number, count in enumerate(counts)]
    found = list(scores_of_all(scorer, texts))
    assert len(found) == len(texts)
    for ids, scores in zip(texts, found, strict=True):
        assert np.array_equal(scores, scores_of(Banded(), ids))
    short = [count for count in counts if count]
    if 0 < sum(short) <= 16:
        assert scorer.packs == [len(short)]
