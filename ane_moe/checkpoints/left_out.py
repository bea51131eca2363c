"""Tensors beside a language model that transformers too leaves out when it loads that alone."""

import re
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from itertools import takewhile

from ane_moe.errors import UserError
from ane_moe.wording import counted, listed

LAYER = re.compile(r"model\.layers\.(\d{1,4})\.")
BY_OPTION = "--ignore-tensors"
PREDICTING = "heads that predict further tokens"
# What each part is, and the names of its tensors.
KINDS = {
    "rotary buffers, which are computed": r"(^|\.)rotary_emb\.inv_freq$",
    "a vision tower": r"^((thinker|model)\.)?"
    r"(visual|vision_tower|vision_model|vision_encoder|sam_model|qwen2_model)\.",
    "an audio tower": r"^((thinker|model)\.)?(audio_tower|audio_encoder|audio_model)\.",
    "a projector of images or sound": r"^(model\.)?"
    r"(((multi_?modal|mm|vision|audio|vit_large)_)?projector|embed_(vision|audio))\.",
    "what speaks": r"^(talker|code2wav)\.",
    "what stands between the views of an image": r"^(model\.)?(view_sep[ae]rator|image_newline)$",
    PREDICTING: r"^(model\.)?mtp\.",
    "scales of activations, which are not quantised here": r"\.(input|output|activation|[qkv])"
    r"(_global)?_scale$",
    "a value head of reinforcement learning": r"^v_head\.",
}
# What transformers' own modules hold, and our parts compute.
COMPUTED = {"factors of decays, which are computed": r"\.(query|key|diagonal)_decay$"}


def is_beside(name: str) -> bool:
    """Whether a tensor is of a part that text does not need."""
    return any(re.search(pattern, name) for pattern in KINDS.values())


def left_out(
    extra: Collection[str],
    ignore: Collection[str],
    where: str,
    predicting: range = range(0),
    beside: Mapping[str, str] | None = None,
) -> dict[str, tuple[str, ...]]:
    """The `extra` tensors by why they are left out: the part they belong to, or that a pattern of
    `ignore` (as in a shell) names them. `predicting` are layers after the model's own, which
    predict further tokens (DeepSeek-V3, GLM-4.5). `beside` are KINDS of one family more.

    Raises UserError for a tensor that neither covers, and for a pattern that covers none.
    """
    kinds: dict[str, list[str]] = {}
    known = KINDS | COMPUTED | dict(beside or {})
    unknown, idle = [], set(ignore)
    for name in sorted(extra):
        kind = next((kind for kind, pattern in known.items() if re.search(pattern, name)), None)
        if (layer := LAYER.match(name)) and int(layer[1]) in predicting:
            kind = PREDICTING
        asked = [pattern for pattern in ignore if fnmatchcase(name, pattern)]
        idle -= set(asked)
        if kind or asked:
            kinds.setdefault(kind or BY_OPTION, []).append(name)
        else:
            unknown.append(name)
    if unknown:
        raise UserError(
            f"{where} holds {counted(len(unknown), 'tensor')} that its config.json does not "
            "account for",
            listed(unknown),
            f"mend config.json if they belong to the model; if it works without them, {BY_OPTION} "
            f"'{_pattern(unknown)}' leaves them out",
        )
    if idle:
        raise UserError(
            f"no tensor is left over that {BY_OPTION} {min(idle)!r} could mean",
            f"{listed(extra) or 'none'} left over",
            "leave the option out",
        )
    return {kind: tuple(names) for kind, names in kinds.items()}


def _pattern(names: Collection[str]) -> str:
    """A pattern that covers the first of `names`, and those below the same module."""
    first = sorted(names)[0]
    same = [name for name in names if name.split(".")[:1] == first.split(".")[:1]]
    if len(same) == 1:
        return first
    levels = zip(*(name.split(".") for name in same), strict=False)
    shared = takewhile(lambda level: len(set(level)) == 1, levels)
    return ".".join([*(level[0] for level in shared), "*"])
