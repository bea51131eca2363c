"""A layer's router as the host has it, and which experts it would choose.

d = d_model, C = classes of a router: experts, and idle ones after them; k = experts per token.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ane_moe.early_adapters import levelled
from ane_moe.errors import UserError
from ane_moe.manifest import Manifest
from ane_moe.model.ranking import PLAIN, Ranking, parse_ranking


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


# What logits `[...,C]` become.
SCORES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "logits": lambda logits: logits,
    "sigmoid": lambda logits: 0.5 + 0.5 * np.tanh(0.5 * logits),  # no exponential overflows
    "softmax": _softmax,
}


@dataclass(frozen=True)
class Chooser:
    """Whom scores choose: `k` of the classes, of which the first so many are `experts`, and the
    `idle` ones come after them."""

    experts: int
    k: int
    ranking: Ranking = PLAIN
    idle: int = 0

    @property
    def classes(self) -> int:
        return self.experts + self.idle

    def eligible(self, scores: np.ndarray) -> np.ndarray:
        """Scores `[...,C]` as they are in the groups that are chosen from, else minus infinity."""
        how = self.ranking
        if how.open_groups == how.groups:
            return scores
        groups = scores.reshape(*scores.shape[:-1], how.groups, -1)
        best = np.partition(groups, -how.group_best)[..., -how.group_best :].sum(-1)
        chosen = np.argsort(-best, kind="stable")[..., : how.open_groups]
        is_open = np.zeros(best.shape, bool)
        np.put_along_axis(is_open, chosen, True, -1)
        return np.where(is_open[..., None], groups, -np.inf).reshape(scores.shape)

    def highest(self, scores: np.ndarray) -> list[int]:
        """The experts among the k highest of `scores [C]`, the lowest index winning ties."""
        chosen = np.argsort(-self.eligible(scores), kind="stable")[: self.k].tolist()
        return [one for one in chosen if one < self.experts]


@dataclass(frozen=True)
class RouterTable:
    """`weights` fp32 `[C,d]`, with the norm's weight folded in, and its taking out of the mean;
    `bias` fp32 `[C]`, where there is one."""

    weights: np.ndarray
    chooser: Chooser
    bias: np.ndarray | None = None

    def seen(self, hidden: np.ndarray) -> np.ndarray:
        """Of hidden states `[...,d]` what the norm sees, fp32, but for their scale."""
        exact = hidden.astype(np.float32)
        return exact - exact.mean(-1, keepdims=True) if self.chooser.ranking.centred else exact

    def read(self, hidden: np.ndarray) -> np.ndarray:
        """The same, with a mean square of 1 where the choice hangs on it."""
        seen = self.seen(hidden)
        return levelled(seen) if self.chooser.ranking.sees_scale else seen

    def scores(self, state: np.ndarray) -> np.ndarray:
        """What classes are chosen by, fp32 `[...,C]`, of what is `read` of hidden states, or of
        what an adapter makes of them."""
        how, logits = self.chooser.ranking, state @ self.weights.T
        if how.softcap is not None:
            logits = np.tanh(logits / how.softcap) * how.softcap
        scores = SCORES[how.score](logits)
        return scores if self.bias is None else scores + self.bias


def choosers(manifest: Manifest) -> dict[int, Chooser]:
    """By layer with experts. Raises UserError where the manifest's facts are not sound."""
    return {int(layer): _chooser(facts) for layer, facts in manifest.moe.items()}


def read_routers(folder: Path, manifest: Manifest) -> dict[int, RouterTable]:
    """Routers the conversion left for the host: fp16 files `[C,d]`, and `[C]` where there is a
    bias, named by `manifest.moe[layer]["router"]`.

    Raises UserError when there are none, or one is not listed among the conversion's files or of
    another size.
    """
    own = {layer: facts for layer, facts in manifest.moe.items() if "router" in facts}
    if not own:
        raise UserError(
            "this conversion holds no router tables",
            "",
            "convert again, or choose another predictor",
        )
    return {int(layer): _table(folder, manifest, layer) for layer in own}


def _chooser(facts: Mapping[str, Any]) -> Chooser:
    chooser = Chooser(int(facts["experts"]), int(facts["k"]), idle=int(facts.get("idle", 0)))
    ranking = parse_ranking(facts.get("ranking", {}), chooser.classes)
    return replace(chooser, ranking=ranking)


def _table(folder: Path, manifest: Manifest, layer: str) -> RouterTable:
    facts, width = manifest.moe[layer], manifest.d_model
    path, chooser = folder / facts["router"], _chooser(facts)
    count = chooser.classes * (width + chooser.ranking.bias)
    listed = facts["router"] in manifest.files and path.is_file()
    if not listed or path.stat().st_size != 2 * count:
        raise UserError(
            f"the router table of layer {layer} is not sound",
            str(facts["router"]),
            "convert again",
        )
    numbers = np.fromfile(path, "<f2").astype(np.float32)
    weights, bias = np.split(numbers, [chooser.classes * width])
    weights = weights.reshape(chooser.classes, width)
    return RouterTable(weights, chooser, bias if chooser.ranking.bias else None)
