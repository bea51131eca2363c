"""Guessing the experts a layer will need, so that they load while the layer before it computes.

d = d_model, E = experts of a layer, C = classes of its router (idle experts too), k = experts per
token.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Protocol

import numpy as np

from ane_moe.early_adapters import Adapter, Adapters, read_adapters
from ane_moe.errors import UserError
from ane_moe.loop.ahead_rule import CONTENTION, AheadRule
from ane_moe.loop.experts import ExpertDispatch
from ane_moe.loop.figures import PrefetchFigures
from ane_moe.loop.router_table import Chooser, RouterTable, choosers, read_routers
from ane_moe.manifest import Manifest
from ane_moe.model.port import GUESS, STREAM
from ane_moe.wording import counted


class Predictor(Protocol):
    """Guesses experts during decode. `predict` is asked before a layer runs, `observe` told what it
    then used. `reads`: STREAM, or GUESS where it takes the scores that a shard gives."""

    reads: str = STREAM

    def predict(self, layer: int, hidden: np.ndarray | None) -> Sequence[int]:
        """Experts `layer` may need, likeliest first. `hidden` is the residual stream `[d]` as it
        left the attention of the layer before (or scores `[C]`); None when `layer` is the first of
        the next token."""

    def observe(self, layer: int, experts: Sequence[int]) -> None: ...


class PreviousToken(Predictor):
    """The experts the previous token used in that layer."""

    def __init__(self) -> None:
        self._used: dict[int, tuple[int, ...]] = {}

    def predict(self, layer: int, hidden: np.ndarray | None) -> Sequence[int]:
        return self._used.get(layer, ())

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        self._used[layer] = tuple(experts)


class Fallible(Predictor):
    """Falls back on the previous token where it knows of nothing better."""

    def __init__(self) -> None:
        self._previous = PreviousToken()

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        self._previous.observe(layer, experts)


class MostUsed(Predictor):
    """The experts that the layer used most often so far, k of them."""

    def __init__(self, experts: Mapping[int, int]) -> None:
        """`experts`: how many each layer has."""
        self._counts = {layer: np.zeros(count, np.int64) for layer, count in experts.items()}
        self._k: dict[int, int] = {}

    def predict(self, layer: int, hidden: np.ndarray | None) -> Sequence[int]:
        order = np.argsort(-self._counts[layer], kind="stable")
        return order[: self._k.get(layer, 0)].tolist()

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        self._counts[layer][list(experts)] += 1
        self._k[layer] = max(len(experts), self._k.get(layer, 0))


class LayerBefore(Fallible):
    """The experts that the token used in the layer before: what routers that layers share choose
    more often than not (Omni-router, arXiv 2507.05724). Falls back on the previous token in the
    first layer, and where the layer before has another number of experts."""

    def __init__(self, experts: Mapping[int, int]) -> None:
        """`experts`: how many each layer has."""
        super().__init__()
        self._experts = experts
        self._last: tuple[int, Sequence[int]] = (-1, ())

    def predict(self, layer: int, hidden: np.ndarray | None) -> Sequence[int]:
        before, used = self._last
        if hidden is None or self._experts.get(before) != self._experts[layer]:
            return self._previous.predict(layer, None)
        return used

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        self._last = (layer, experts)
        super().observe(layer, experts)


class RouterAhead(Fallible):
    """The layer's own router applied early, to a hidden state from some layers before (the residual
    stream moves slowly: Eliseev and Mazur 2023, arXiv 2312.17238); to what an adapter makes of it,
    where there are adapters. Falls back on the previous token where there is no hidden state."""

    def __init__(
        self,
        routers: Mapping[int, RouterTable],
        adapters: Mapping[int, Adapter] | None = None,
    ) -> None:
        """Both by the layer that is guessed; no `adapters`: the hidden state as it is."""
        super().__init__()
        self._routers = routers
        self._adapters = adapters or {}

    def predict(self, layer: int, hidden: np.ndarray | None) -> Sequence[int]:
        if hidden is None or layer not in self._routers:
            return self._previous.predict(layer, None)
        return self._routers[layer].chooser.highest(self.scores(layer, hidden))

    def scores(self, layer: int, hidden: np.ndarray) -> np.ndarray:
        """What the router of `layer` would rank its classes by for hidden states `[...,d]`, fp32
        `[...,C]`."""
        router, adapter = self._routers[layer], self._adapters.get(layer)
        return router.scores(adapter(router.seen(hidden)) if adapter else router.read(hidden))


class ShardScores(Fallible):
    """What the attention shard of an earlier layer gives for the layer's experts, as an output of
    its call. Falls back on the previous token where it gives none."""

    reads = GUESS

    def __init__(self, choosers: Mapping[int, Chooser]) -> None:
        """`choosers`: by the layer that is guessed."""
        super().__init__()
        self._choosers = choosers

    def predict(self, layer: int, hidden: np.ndarray | None) -> Sequence[int]:
        if hidden is None:
            return self._previous.predict(layer, None)
        return self._choosers[layer].highest(hidden.astype(np.float32))


def _experts(manifest: Manifest) -> dict[int, int]:
    """How many each layer has."""
    return {int(layer): int(facts["experts"]) for layer, facts in manifest.moe.items()}


@dataclass(frozen=True)
class Guessing:
    """How a session guesses: by the predictor of this name (a key of PREDICTORS; AUTO: by what
    shards give, where they do), so many layers with experts `ahead` (None: as far as shards do, or
    1), with `adapters` where it takes them; what it loads `only_if_it_pays`, if computing takes
    1 + `contention` as long meanwhile."""

    predictor: str = "none"
    ahead: int | None = None
    adapters: Adapters | None = None
    only_if_it_pays: bool = False
    contention: float = CONTENTION


def guesses_of(manifest: Manifest) -> dict[int, int]:
    """The layers whose shards guess experts, and those that they guess them of."""
    return {int(n): one["guesses"] for n, one in manifest.moe.items() if "guesses" in one}


def guessed_ahead(manifest: Manifest) -> int | None:
    """How many layers with experts ahead shards guess; None where they do not. Raises UserError
    where they do not agree."""
    place = {layer: number for number, layer in enumerate(_routed(manifest))}
    pairs = guesses_of(manifest).items()
    far = {place.get(meant, -1) - place[layer] for layer, meant in pairs}
    if len(far) > 1 or min(far, default=1) < 1:
        raise UserError("the shards guess no one distance ahead", str(dict(pairs)), "convert again")
    return next(iter(far), None)


def _routed(manifest: Manifest) -> list[int]:
    """The layers with experts."""
    return sorted(map(int, manifest.moe))


def settled(guessing: Guessing, manifest: Manifest) -> Guessing:
    """With all said that was left open. Raises UserError for an unknown name, for guesses of shards
    that give none, or of another distance."""
    own = guessed_ahead(manifest)
    name = (BY_SHARD if own else "none") if guessing.predictor == AUTO else guessing.predictor
    if name not in PREDICTORS:
        known = ", ".join([AUTO, *PREDICTORS])
        raise UserError("unknown predictor", name, f"choose one of: {known}")
    ahead = guessing.ahead or own or 1
    if name == BY_SHARD and own is None:
        raise UserError(
            "the shards of this conversion guess no experts",
            f"--predictor {BY_SHARD}",
            "convert with --early FILE, or choose another predictor",
        )
    if name == BY_SHARD and own and ahead != own:
        raise UserError(
            f"the shards guess experts {counted(own, 'layer')} ahead",
            f"--ahead {ahead}",
            "leave --ahead out, or convert with another one",
        )
    return replace(guessing, predictor=name, ahead=ahead)


def _aligned(folder: Path, manifest: Manifest, guessing: Guessing) -> Predictor:
    """A router's guess at what adapters make of the hidden state: those that are given, or those
    that shards have taken up. Raises UserError when there are none for this distance."""
    adapters_of = guessing.adapters or _taken_up(folder, manifest)
    given, layers = adapters_of.ahead, _routed(manifest)
    meant = dict(zip(layers, layers[guessing.ahead :], strict=False))
    adapters = {
        meant[layer]: one
        for (layer, far), one in given.items()
        if far == guessing.ahead and layer in meant
    }
    if not adapters:
        raise UserError(
            f"there are no adapters for experts {counted(guessing.ahead or 1, 'layer')} ahead",
            f"{len(given)} adapters",
            "give --adapters FILE, made by `ane-moe align` on this conversion",
        )
    return RouterAhead(read_routers(folder, manifest), adapters)


def _taken_up(folder: Path, manifest: Manifest) -> Adapters:
    """The adapters that lie in a conversion; none where there are none."""
    if manifest.early is None or manifest.early not in manifest.files:
        return Adapters(manifest.d_model)
    return read_adapters(folder / manifest.early, manifest.d_model)


def _by_shard(folder: Path, manifest: Manifest, guessing: Guessing) -> Predictor:
    return ShardScores(choosers(manifest))


AUTO, BY_SHARD = "auto", "shard"
# name -> makes the predictor of one session
PREDICTORS: dict[str, Callable[[Path, Manifest, Guessing], Predictor | None]] = {
    "none": lambda folder, manifest, how: None,
    "static": lambda folder, manifest, how: MostUsed(_experts(manifest)),
    "previous": lambda folder, manifest, how: PreviousToken(),
    "layer": lambda folder, manifest, how: LayerBefore(_experts(manifest)),
    "router": lambda folder, manifest, how: RouterAhead(read_routers(folder, manifest)),
    "adapter": _aligned,
    BY_SHARD: _by_shard,
}


class Prefetch:
    """Asks a predictor and loads what it names ahead, during decode: prefill uses nearly every
    expert anyway."""

    def __init__(
        self,
        predictor: Predictor,
        dispatch: ExpertDispatch,
        figures: PrefetchFigures,
        ahead: int = 1,
        rule: AheadRule | None = None,
    ) -> None:
        """`ahead`: how many layers with experts lie from the running one to the one that is
        guessed; `rule`: when to load (None: always). Raises UserError where there are not so many
        layers."""
        self._predictor = predictor
        self.reads = predictor.reads
        self._dispatch = dispatch
        self._figures = figures
        self._layers = list(dispatch.layers)
        if not 1 <= ahead <= len(self._layers):
            lacking = f"there are no experts {counted(ahead, 'layer')} ahead"
            raise UserError(lacking, f"{counted(len(self._layers), 'layer')} with experts")
        self._ahead = ahead
        self._rule = rule
        self._predicted: dict[int, list[int]] = {}  # by layers to come, in their order
        self._lock = Lock()  # tracks run at once

    def layer_starts(self, layer: int, used: Sequence[int], hidden: np.ndarray | None) -> None:
        """The gates of `layer` chose `used`; `hidden` is the residual stream `[d]` its experts will
        add to, or the scores that its shard gives, where it does: what the predictor `reads`."""
        place = self._layers.index(layer) + self._ahead
        following = self._layers[place % len(self._layers)]
        same_token = place < len(self._layers)
        with self._lock:
            asked = layer in self._predicted
            predicted = self._predicted.pop(layer, [])
            right = len(set(predicted).intersection(used))
            if asked:
                self._figures.needed += len(used)
                self._figures.predicted += len(predicted)
                self._figures.right += right
            self._predictor.observe(layer, used)
            experts = list(self._predictor.predict(following, hidden if same_token else None))
            self._predicted[following] = experts
            coming = list(self._predicted.items())
            if self._rule:
                self._rule.layer_starts(right, len(predicted))
                if not self._rule.pays(len(experts), self._dispatch.resident(following, experts)):
                    self._figures.withheld += 1
                    return
        self._dispatch.load_ahead(coming, (layer, used))


def make_predictor(guessing: Guessing, folder: Path, manifest: Manifest) -> Predictor | None:
    """Raises UserError as `settled` does, and for what the predictor lacks."""
    how = settled(guessing, manifest)
    return PREDICTORS[how.predictor](folder, manifest, how)
