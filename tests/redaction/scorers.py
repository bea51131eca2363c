"""Scorers and tokenizers for tests of the text side: numpy ones, and Hugging Face's own model."""

import numpy as np
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import (
    OpenAIPrivacyFilterConfig,
    OpenAIPrivacyFilterForTokenClassification,
    PreTrainedTokenizerFast,
)

from ane_moe.loop.tokenizer import Tokenizer

PUBLISHED = tuple(OpenAIPrivacyFilterConfig().id2label.values())
LARGE = 1_000_003


class Packing:
    """Texts that share a window, each scored alone."""

    def packed(self, texts):
        assert all(texts) and sum(map(len, texts)) <= max(self.lengths)
        self.packs = [*getattr(self, "packs", []), len(texts)]
        return np.concatenate([self.logits(ids) for ids in texts])


class Banded(Packing):
    """Scores of whole numbers that depend on ids up to `band * depth` away, and on each of them:
    no rounding, so windows are exact or they are not."""

    labels = PUBLISHED

    def __init__(self, lengths=(16, 64), band=3, depth=4, vocab=300):
        self.lengths, self.band, self.depth = lengths, band, depth
        self.context_each_side = band * depth
        self.table = np.random.default_rng(0).integers(1, LARGE, (vocab, len(PUBLISHED)))
        self.calls = []

    def logits(self, ids):
        assert 0 < len(ids) <= max(self.lengths)
        self.calls.append(len(ids))
        return self.whole(ids)

    def whole(self, ids):
        values = self.table[np.asarray(ids)]
        for _ in range(self.depth):
            padded = np.pad(values, ((self.band, self.band), (0, 0)))
            sides = range(2 * self.band + 1)
            shifted = [padded[side : side + len(values)] * (side + 2) for side in sides]
            values = sum(shifted) % LARGE
        return (values % 997 / 100).astype(np.float32)


class Digits(Packing):
    """Labels every token of a digit as an account number: spans are runs of digits."""

    labels, lengths, context_each_side = PUBLISHED, (64,), 2

    def __init__(self, tokenizer):
        pieces = tokenizer.loaded.convert_ids_to_tokens(range(len(tokenizer.loaded)))
        self.digit = [piece.isdigit() for piece in pieces]

    def logits(self, ids):
        scores = np.zeros((len(ids), len(PUBLISHED)), np.float32)
        inside = [False, *(self.digit[one] for one in ids), False]
        for token in range(len(ids)):
            before, here, after = inside[token : token + 3]
            tag = {(0, 0): "S", (0, 1): "B", (1, 1): "I", (1, 0): "E"}[before, after]
            scores[token, PUBLISHED.index(f"{tag}-account_number") if here else 0] = 9
        return scores


class HuggingFace(Packing):
    """Hugging Face's own model in fp32, as a scorer with windows of at most `length` tokens."""

    def __init__(self, model, length):
        self.model, self.lengths = model.eval().float(), (length,)
        self.labels = tuple(model.config.id2label.values())
        config = model.config
        self.context_each_side = config.sliding_window * config.num_hidden_layers

    def logits(self, ids):
        assert 0 < len(ids) <= self.lengths[0]
        return self.whole(ids)

    @torch.inference_mode()
    def whole(self, ids):
        return self.model(input_ids=torch.tensor([list(ids)])).logits[0].numpy()


def tiny_model(**changes):
    """A random model of the family."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 300,
        "hidden_size": 24,
        "intermediate_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 4,
        "initializer_range": 0.5,
        "pad_token_id": 0,
        "eos_token_id": 0,
    }
    return OpenAIPrivacyFilterForTokenClassification(OpenAIPrivacyFilterConfig(**sizes | changes))


def byte_tokenizer():
    """A token for each byte of UTF-8, and for a few pairs: tokens part characters, and join them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {one: index for index, one in enumerate(alphabet)}
    merges = [("Ġ", "a"), ("e", "n"), ("Ã", "©"), ("a", "n"), ("Ċ", "Ċ")]
    vocab |= {a + b: len(vocab) + index for index, (a, b) in enumerate(merges)}
    backend = Backend(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
