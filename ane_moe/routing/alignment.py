"""Fitting adapters that say early what the hidden state will be, and how well experts are guessed
with them and without.

An adapter is a ridge regression in closed form, of what layers between will change, cut to the rank
that loses least of it on the tokens of the fit. N = tokens, d = d_model, E = experts, k = experts
per token, r = rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from ane_moe.early_adapters import Adapter, Adapters, levelled
from ane_moe.errors import UserError
from ane_moe.loop.router_table import RouterTable, read_routers
from ane_moe.loop.shards import LoadedShards, load_shards
from ane_moe.original.prompts import cut_passages, read_prompts
from ane_moe.progress import Progress, silent
from ane_moe.routing.residuals import Residuals, record_residuals

DISTANCES = (1, 2, 4)
RANK = 24
RIDGE = 1e-2  # of the mean square of a channel, which is 1
FIT_SHARE = 2 / 3  # of the passages' tokens; what is reported is of the rest
WINDOW = 256
MAX_TOKENS = 6144
Routers = Mapping[int, RouterTable]


@dataclass(frozen=True)
class Recall:
    """Of the experts that tokens left out of the fit choose in `layer`, the share that is named by
    k guesses, and by 2 k; `predictor` as in `generate`, `distance` layers with experts before."""

    predictor: str
    distance: int
    layer: int
    at_k: float
    at_2k: float


@dataclass(frozen=True)
class Alignment:
    """The adapters, and what they are worth. `exits`: the share of tokens left out of the fit whose
    hidden state leaving a layer, plain and adapted, points to where the last layer's does (cosine,
    means)."""

    adapters: Adapters
    rank: int
    tokens_fitted: int
    tokens_left_out: int
    recalls: tuple[Recall, ...]
    exits: Mapping[int, tuple[float, float]]

    @property
    def means(self) -> dict[tuple[str, int], tuple[float, float]]:
        """By predictor and distance, over layers: recall at k and at 2 k."""
        rows: dict[tuple[str, int], list[Recall]] = {}
        for one in self.recalls:
            rows.setdefault((one.predictor, one.distance), []).append(one)
        return {
            key: (
                float(np.mean([one.at_k for one in own])),
                float(np.mean([one.at_2k for one in own])),
            )
            for key, own in rows.items()
        }

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        means = [
            {"predictor": name, "distance": far, "recall_at_k": one, "recall_at_2k": two}
            for (name, far), (one, two) in self.means.items()
        ]
        return {
            "rank": self.rank,
            "tokens_fitted": self.tokens_fitted,
            "tokens_left_out": self.tokens_left_out,
            "means": means,
            "layers": [asdict(one) for one in self.recalls],
            "exits": {str(layer): list(pair) for layer, pair in self.exits.items()},
        }


def align(
    folder: Path,
    text: Path,
    *,
    rank: int = RANK,
    distances: Sequence[int] = DISTANCES,
    max_tokens: int = MAX_TOKENS,
    runtime: str = "auto",
    progress: Progress = silent,
    **options: Any,
) -> Alignment:
    """Run a conversion over `text` and fit adapters on two thirds of its passages. Hidden states of
    all tokens and layers are held in memory, fp16.

    `text` is as for `read_prompts`. Raises UserError for senseless numbers, and a conversion
    without prefill, or whose layers leave no hidden state of all tokens.
    """
    if rank < 1 or min(distances, default=0) < 1:
        raise UserError("a rank and distances are 1 or more", f"{rank}, {list(distances)}")
    free = psutil.virtual_memory().available // 4
    shards = load_shards(folder, runtime, expert_cache_bytes=free, **options)
    window = min(WINDOW, shards.manifest.context)
    passages = cut_passages(read_prompts(text, folder), window, max_tokens)
    if len(passages) < 3:
        raise UserError(
            "there is too little text to fit adapters", f"{len(passages)} passages", "give more"
        )
    return fit(shards, passages, rank, distances, progress)


def fit(
    shards: LoadedShards,
    passages: Sequence[Sequence[int]],
    rank: int,
    distances: Sequence[int],
    progress: Progress = silent,
) -> Alignment:
    """Adapters of `rank`, on the first two thirds of `passages`."""
    heard = record_residuals(shards, passages, progress)
    cut = sum(map(len, passages[: int(len(passages) * FIT_SHARE)]))
    layers = list(heard.entering)
    routers = read_routers(shards.folder, shards.manifest) if layers else {}
    ahead: dict[tuple[int, int], Adapter] = {}
    recalls: list[Recall] = []
    for far in distances:
        for layer, meant in zip(layers, layers[far:], strict=False):
            progress(f"fitting {far} ahead", layers.index(layer), len(layers))
            x, y = pair(heard, layer, meant, routers.get(meant))
            adapter = ahead[layer, far] = fit_adapter(x[:cut], y[:cut], rank)
            recalls += _recalls(heard, layer, meant, far, cut, routers, adapter)
    exits, cosines = {}, {}
    *earlier, last = heard.leaving
    for layer in earlier:
        x, y = heard.leaving[layer], heard.leaving[last]
        adapter = exits[layer] = fit_adapter(x[:cut], y[:cut], rank)
        target = levelled(y[cut:])
        cosines[layer] = (cosine(levelled(x[cut:]), target), cosine(adapter(x[cut:]), target))
    count = sum(map(len, passages))
    adapters = Adapters(shards.manifest.d_model, ahead, exits)
    return Alignment(adapters, rank, cut, count - cut, tuple(recalls), cosines)


def pair(
    heard: Residuals, layer: int, meant: int, router: RouterTable | None
) -> tuple[np.ndarray, np.ndarray]:
    """What is there when `layer` has chosen, and what the router of `meant` will read, as its norm
    sees them, `[N,d]`."""
    given, wanted = heard.entering[layer], heard.entering[meant]
    if router is None:
        return given, wanted
    if router.chooser.ranking.before_mixer:
        wanted = heard.leaving[max(before for before in heard.leaving if before < meant)]
    return router.seen(given), router.seen(wanted)


def fit_adapter(x: np.ndarray, y: np.ndarray, rank: int) -> Adapter:
    """From hidden states `x [N,d]` to `y [N,d]`, both levelled: the ridge regression of y - x on x,
    cut to the `rank` directions in which its values on `x` are largest."""
    given, wanted = (levelled(one).astype(np.float64) for one in (x, y))
    squares = given.T @ given
    ridge = squares + RIDGE * len(given) * np.eye(len(squares))
    full = np.linalg.solve(ridge, given.T @ (wanted - given))  # (d, d)
    _, directions = np.linalg.eigh(full.T @ squares @ full)  # rising
    kept = directions[:, ::-1][:, :rank]
    return Adapter((full @ kept).astype(np.float32), kept.T.astype(np.float32))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over rows `[N,d]`."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(1) / np.maximum(lengths, 1e-12)).mean())


def _recalls(
    heard: Residuals, layer: int, meant: int, far: int, cut: int, routers: Routers, own: Adapter
) -> list[Recall]:
    """On tokens left out of the fit, by each predictor."""
    if meant not in routers:
        return []
    router, x = routers[meant], heard.entering[layer][cut:]
    chooser, classes = router.chooser, len(router.weights)
    chosen = heard.chosen[meant] & (np.arange(classes) < chooser.experts)  # idle: nothing to load
    popular = np.broadcast_to(chosen[:cut].mean(0), (len(x), classes))
    before = chosen[cut - 1 : -1].astype(np.float64) + popular * 1e-3
    by_router = {"router": router.read(x), "adapter": own(router.seen(x))}
    scores = {"static": popular, "previous": before}
    scores |= {name: chooser.eligible(router.scores(one)) for name, one in by_router.items()}
    k = chooser.k
    return [
        Recall(name, far, meant, *(recall(one, chosen[cut:], k * times) for times in (1, 2)))
        for name, one in scores.items()
    ]


def recall(scores: np.ndarray, chosen: np.ndarray, guesses: int) -> float:
    """The share of `chosen` (bool `[N,E]`) among the `guesses` highest `scores [N,E]` of each
    token."""
    named = np.argsort(-scores, axis=1, kind="stable")[:, :guesses]
    return float(np.take_along_axis(chosen, named, 1).sum() / max(1, chosen.sum()))
