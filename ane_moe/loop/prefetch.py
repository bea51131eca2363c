"""Guessing the experts a layer will need, so that they load while the layer before it computes.

d = d_model, E = experts of a layer, k = experts per token.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Protocol

import numpy as np

from ane_moe.errors import UserError
from ane_moe.loop.experts import ExpertDispatch
from ane_moe.loop.figures import PrefetchFigures
from ane_moe.manifest import Manifest


class Predictor(Protocol):
    """Guesses experts during decode. `predict` is asked before a layer runs, `observe` told what it
    then used."""

    def predict(self, layer: int, hidden: np.ndarray | None) -> Sequence[int]:
        """Experts `layer` may need, likeliest first. `hidden` is the residual stream `[d]` as it
        left the attention of the layer before; None when `layer` is the first of the next token."""

    def observe(self, layer: int, experts: Sequence[int]) -> None: ...


class PreviousToken:
    """The experts the previous token used in that layer."""

    def __init__(self) -> None:
        self._used: dict[int, tuple[int, ...]] = {}

    def predict(self, layer: int, hidden: np.ndarray | None) -> Sequence[int]:
        return self._used.get(layer, ())

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        self._used[layer] = tuple(experts)


class MostUsed:
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


class LayerBefore:
    """The experts that the token used in the layer before: what routers that layers share choose
    more often than not (Omni-router, arXiv 2507.05724). Falls back on the previous token in the
    first layer, and where the layer before has another number of experts."""

    def __init__(self, experts: Mapping[int, int]) -> None:
        """`experts`: how many each layer has."""
        self._experts = experts
        self._previous = PreviousToken()
        self._last: tuple[int, Sequence[int]] = (-1, ())

    def predict(self, layer: int, hidden: np.ndarray | None) -> Sequence[int]:
        before, used = self._last
        if hidden is None or self._experts.get(before) != self._experts[layer]:
            return self._previous.predict(layer, None)
        return used

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        self._last = (layer, experts)
        self._previous.observe(layer, experts)


class NextRouter:
    """The layer's own router applied early, to the hidden state one block too soon (the residual
    stream moves slowly:
    Eliseev and Mazur 2023, arXiv 2312.17238). Falls back on the previous token where there is no
    hidden state."""

    def __init__(self, routers: dict[int, tuple[np.ndarray, int]]) -> None:
        """`routers`: layer -> (fp32 weights `[E,d]` with the norm's weight folded in, k). The
        norm's scale does not change which k score highest."""
        self._routers = routers
        self._previous = PreviousToken()

    def predict(self, layer: int, hidden: np.ndarray | None) -> Sequence[int]:
        if hidden is None or layer not in self._routers:
            return self._previous.predict(layer, None)
        weights, k = self._routers[layer]
        return np.argsort(-(weights @ hidden.astype(np.float32)), kind="stable")[:k].tolist()

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        self._previous.observe(layer, experts)


def read_routers(folder: Path, manifest: Manifest) -> dict[int, tuple[np.ndarray, int]]:
    """Routers the conversion left for the host: fp16 `[E,d]` files named by
    `manifest.moe[layer]["router"]`.

    Raises UserError when there are none, or one is not listed among the conversion's files or of
    another size.
    """
    routers = {}
    for layer, facts in manifest.moe.items():
        if "router" not in facts:
            continue
        path, shape = folder / facts["router"], (facts["experts"], manifest.d_model)
        listed = facts["router"] in manifest.files and path.is_file()
        if not listed or path.stat().st_size != 2 * shape[0] * shape[1]:
            raise UserError(
                f"the router table of layer {layer} is not sound",
                str(facts["router"]),
                "convert again",
            )
        routers[int(layer)] = (
            np.fromfile(path, "<f2").reshape(shape).astype(np.float32),
            int(facts["k"]),
        )
    if not routers:
        raise UserError(
            "this conversion holds no router tables",
            "",
            "convert again, or choose another predictor",
        )
    return routers


def _experts(manifest: Manifest) -> dict[int, int]:
    """How many each layer has."""
    return {int(layer): int(facts["experts"]) for layer, facts in manifest.moe.items()}


# name -> makes the predictor of one session
PREDICTORS: dict[str, Callable[[Path, Manifest], Predictor | None]] = {
    "none": lambda folder, manifest: None,
    "static": lambda folder, manifest: MostUsed(_experts(manifest)),
    "previous": lambda folder, manifest: PreviousToken(),
    "layer": lambda folder, manifest: LayerBefore(_experts(manifest)),
    "router": lambda folder, manifest: NextRouter(read_routers(folder, manifest)),
}


class Prefetch:
    """Asks a predictor and loads what it names ahead, during decode: prefill uses nearly every
    expert anyway."""

    def __init__(
        self, predictor: Predictor, dispatch: ExpertDispatch, figures: PrefetchFigures
    ) -> None:
        self._predictor = predictor
        self._dispatch = dispatch
        self._figures = figures
        layers = list(dispatch.layers)
        self._next = dict(zip(layers, layers[1:] + layers[:1], strict=True))
        self._last = layers[-1]
        self._predicted: dict[int, frozenset[int]] = {}
        self._lock = Lock()  # tracks run at once

    def layer_starts(self, layer: int, used: Sequence[int], hidden: np.ndarray) -> None:
        """The gates of `layer` chose `used`; `hidden` is the residual stream `[d]` its experts will
        add to."""
        following = self._next[layer]
        with self._lock:
            if layer in self._predicted:
                predicted = self._predicted.pop(layer)
                self._figures.needed += len(used)
                self._figures.predicted += len(predicted)
                self._figures.right += len(predicted.intersection(used))
            self._predictor.observe(layer, used)
            experts = self._predictor.predict(following, None if layer == self._last else hidden)
            self._predicted[following] = frozenset(experts)
        self._dispatch.load_ahead(following, experts, (layer, used))


def make_predictor(name: str, folder: Path, manifest: Manifest) -> Predictor | None:
    """Raises UserError for an unknown name."""
    if name not in PREDICTORS:
        raise UserError("unknown predictor", name, f"choose one of: {', '.join(PREDICTORS)}")
    return PREDICTORS[name](folder, manifest)
