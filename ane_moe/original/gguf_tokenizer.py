"""A tokenizer out of the vocabulary of a GGUF file."""

from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Pipeline
from tokenizers.processors import TemplateProcessing

from ane_moe.checkpoints.gguf.vocabulary import (
    BYTE,
    BYTE_LEVEL,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
)

SPACE = "▁"  # sentencepiece's
PIECES = (NORMAL, USER_DEFINED)


def tokenizer_of(vocabulary: Vocabulary) -> Any:
    """A tokenizer of transformers."""
    from transformers import PreTrainedTokenizerFast

    pipeline = _byte_level(vocabulary) if vocabulary.model == BYTE_LEVEL else _pieces(vocabulary)
    special = _added(vocabulary, CONTROL, UNKNOWN, special=True)
    pipeline.add_special_tokens(special)
    pipeline.add_tokens(_added(vocabulary, USER_DEFINED, special=False))
    pipeline.post_processor = _ends(vocabulary)
    return PreTrainedTokenizerFast(
        tokenizer_object=pipeline,
        chat_template=vocabulary.template,
        clean_up_tokenization_spaces=False,
        **vocabulary.special,
    )


def _byte_level(vocabulary: Vocabulary) -> Pipeline:
    assert vocabulary.pre is not None
    pre = vocabulary.pre
    pipeline = Pipeline(models.BPE(_ids(vocabulary), vocabulary.merges, ignore_merges=pre.whole))
    cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in pre.cuts]
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pipeline.pre_tokenizer = pre_tokenizers.Sequence([*cuts, bytes_alone])
    pipeline.decoder = decoders.ByteLevel()
    if pre.composed:
        pipeline.normalizer = normalizers.NFC()
    return pipeline


def _pieces(vocabulary: Vocabulary) -> Pipeline:
    """sentencepiece's BPE, as transformers' converter has it."""
    model = models.BPE(
        _ids(vocabulary),
        _merges(vocabulary),
        unk_token=vocabulary.special.get("unk_token"),
        fuse_unk=True,
        byte_fallback=BYTE in vocabulary.kinds,
    )
    pipeline = Pipeline(model)
    first = [normalizers.Prepend(SPACE)] if vocabulary.space_first else []
    pipeline.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", SPACE)])
    stripped = [decoders.Strip(" ", 1, 0)] if vocabulary.space_first else []
    plain = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    pipeline.decoder = decoders.Sequence([*plain, *stripped])
    return pipeline


def _ids(vocabulary: Vocabulary) -> dict[str, int]:
    """Those that stand for text: others only fill the embedding."""
    pairs = enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True))
    return {token: number for number, (token, kind) in pairs if kind != UNUSED}


def _merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """All pairs of pieces that are a piece, those of the highest score first."""
    entries = zip(vocabulary.tokens, vocabulary.scores, vocabulary.kinds, strict=True)
    scores = {token: score for token, score, kind in entries if kind in PIECES}
    numbers = _ids(vocabulary)
    found = []
    for token, score in scores.items():
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        pairs = [pair for pair in cuts if scores.keys() >= {*pair}]
        found += [(score, *pair) for pair in pairs]
    order = sorted(
        found,
        key=lambda pair: (-pair[0], -len(pair[1]), -len(pair[2]), numbers[pair[1]]),
    )
    return [(left, right) for _, left, right in order]


def _added(vocabulary: Vocabulary, *kinds: int, special: bool) -> list[AddedToken]:
    pairs = zip(vocabulary.tokens, vocabulary.kinds, strict=True)
    return [
        AddedToken(token, normalized=False, special=special)
        for token, kind in pairs
        if kind in kinds
    ]


def _ends(vocabulary: Vocabulary) -> Any:
    """What is put before and after each text."""
    first = vocabulary.special.get("bos_token") if vocabulary.add_bos else None
    last = vocabulary.special.get("eos_token") if vocabulary.add_eos else None
    around = [token for token in (first, last) if token]
    numbers = _ids(vocabulary)
    single = [*([first] if first else []), "$A", *([last] if last else [])]
    pair = [*single, *(f"{token}:1" if token != "$A" else "$B:1" for token in single)]
    ends = [(token, numbers[token]) for token in around if token in numbers]
    if not ends:
        return None
    return TemplateProcessing(single=single, pair=pair, special_tokens=ends)
