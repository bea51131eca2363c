"""Tensor names as transformers' causal language models have them, out of names that were changed.

A model saved from inside something else has a prefix before its names: torch.compile, FSDP,
DistributedDataParallel, PEFT, a vision-language model. AutoModel saves without the usual `model.`,
and transformers itself loads that.
"""

import re
from collections.abc import Collection, Iterable

MODEL, HEAD = "model.", "lm_head.weight"
THINKER = "thinker."  # of models with another decoder that speaks: the one that writes
FIRST_NORMS = (
    "layers.0.input_layernorm.weight",
    "layers.0.operator_norm.weight",
    "layers.0.input_layernorm.norm.weight",
    "layers.0.input_layernorm.0.weight",
)
MAMBA = ("layers.0.norm.weight", "norm_f.weight")  # of models whose first layer is one block
# Modules that torch and FSDP put around others, at any depth; they compute nothing.
WRAPPER = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
PARTS = ("embed_tokens.", "layers.", "norm.", "embeddings.", "norm_f.")


def model_names(stored: Collection[str]) -> dict[str, str]:
    """Each stored name, and the one transformers has for it: `model.` before the decoder, and
    `lm_head` beside it.

    Names stay as they are where `model.` holds a decoder already, where more than one prefix could
    take its place, and where two names would become one.
    """
    plain = {name: WRAPPER.sub("", name) for name in stored}
    bases, heads = decoder_prefixes(plain.values()), _prefixes(plain.values(), HEAD)
    if THINKER + MODEL in bases:
        bases, heads = {THINKER + MODEL}, {THINKER}
    base = next(iter(bases)) if len(bases) == 1 else MODEL
    head = next(iter(heads)) if len(heads) == 1 else ""
    renamed = {name: _renamed(inner, base, head) for name, inner in plain.items()}
    unique = len(set(renamed.values())) == len(renamed)
    return renamed if unique else {name: name for name in stored}


def decoder_prefixes(names: Iterable[str]) -> set[str]:
    """What stands before `layers.0.` of each decoder: `model.` alone where it is among them."""
    names = set(names)
    ends = ("embed_tokens.weight", "norm.weight")
    first = set().union(*(_prefixes(names, norm) for norm in FIRST_NORMS))
    found = {prefix for prefix in first if any(prefix + end in names for end in ends)}
    found |= _prefixes(names, MAMBA[0]) & _prefixes(names, MAMBA[1])
    return {MODEL} if MODEL in found else found


def example(renamed: dict[str, str]) -> str:
    """A pair of names that differ, of the decoder if possible; nothing where all are the same."""
    pairs = [(not new.startswith(MODEL), old, new) for old, new in renamed.items() if old != new]
    return "{1} is read as {2}".format(*min(pairs)) if pairs else ""


def _prefixes(names: Iterable[str], end: str) -> set[str]:
    return {name.removesuffix(end) for name in names if name == end or name.endswith(f".{end}")}


def _renamed(name: str, base: str, head: str) -> str:
    if name == head + HEAD:
        return HEAD
    rest = name.removeprefix(base)
    return MODEL + rest if name.startswith(base) and (base or rest.startswith(PARTS)) else name
