"""A roster of experts: each token taken several times at once, by experts that are chosen with
noise, and the probabilities averaged.

RoE, arXiv 2509.17238: the k experts of `logits + tau * Gumbel noise` are chosen, weighted as if
there were no noise; the first sample has none, and what it leaves in the caches is what all later
tokens see. n = samples, V = vocabulary, E = experts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from ane_moe.errors import UserError
from ane_moe.json_file import read_json
from ane_moe.loop.cuts import ONE_WAY
from ane_moe.loop.figures import RosterFigures
from ane_moe.loop.session import Session
from ane_moe.loop.shards import LoadedShards
from ane_moe.loop.wiring import Call, Lane
from ane_moe.model.port import GATES, STREAM, slot_arguments, slot_root

TAU = 0.1


@dataclass(frozen=True)
class RosterOptions:
    """`tau` scales the noise; `schedule` does in its place, by layer (0 elsewhere). The first and
    the last `skip_layers` layers with experts have none. Noise is repeatable by `seed`."""

    samples: int
    tau: float = TAU
    schedule: Mapping[int, float] = field(default_factory=dict)
    skip_layers: int = 0
    seed: int | None = None


class RosterSession(Session):
    """A session whose logits are of the averaged probabilities of `samples` of each new token:
    the last of a prompt, and those that follow.

    Samples take cache slots one behind the other, which the next tokens write over; where fewer
    are left, there are fewer samples.
    """

    def __init__(
        self, shards: LoadedShards, options: RosterOptions, *, concurrency: int = 1
    ) -> None:
        """Raises UserError for more samples than a prefill call takes, a scale or layers that are
        not possible, and a conversion whose routers or states do not allow it."""
        super().__init__(shards, concurrency=concurrency)
        ports = {
            port.slot: port
            for call in self._prefill.body.calls
            if isinstance(call, Call)
            for port in call.entry.ports.inputs
        }
        self._require_possible(options.samples, {port.root for port in ports.values()})
        experts = {
            int(slot_arguments(slot)[-1]): (slot, port.shape[1])
            for slot, port in ports.items()
            if port.root == "noise"
        }
        scales = _scales(options, sorted(experts))
        # Of each layer that has some: its slot, E, and what noise is multiplied by.
        self._noise = [(*experts[layer], scale) for layer, scale in scales.items() if scale]
        self._samples = options.samples
        self._gates = sorted(
            slot for slot in _outputs(self._prefill.body) if slot_root(slot) == GATES
        )
        self.figures.roster = RosterFigures(options.samples, len(self._gates))
        self._random = np.random.default_rng(options.seed)

    def prefill(self, ids: Sequence[int]) -> np.ndarray:
        self._require(ids)
        if len(ids) > 1:
            super().prefill(ids[:-1])
        self.prompt = None if self.prompt == self.position else self.prompt
        logits = self.decode(ids[-1])
        self._end_prompt()
        return logits

    def decode(self, identifier: int) -> np.ndarray:
        logits = self.samples(identifier)
        self._logits[:] = averaged(logits)
        return self._view

    def samples(self, identifier: int) -> np.ndarray:
        """Take in one token; the logits of each of its samples, a new fp32 array `[n, V]`."""
        self._require([identifier])
        started, clock, lane = perf_counter(), self._decode_clock, self._prefill
        count = min(self._samples, self.manifest.cache_width - self.position)
        lane.slots.place(self.position, count, roster=True, prompt=self.prompt)
        for slot, experts, scale in self._noise:
            noise = scale * self._random.gumbel(size=(experts, count - 1))
            lane.slots.columns(slot)[:, 1:count] = noise
        lane.slots.columns(STREAM)[:, :count] = self._rows([identifier]).T
        lane.slots.columns(STREAM)[:, count:] = 0
        lane.body.run(clock)
        self.position += 1
        self._count(count)
        logits = np.empty((count, self.manifest.vocab), np.float32)
        for rows, scores in lane.logits(clock):
            logits[:, rows] = scores[:, :count].T
        self._done(clock, 1, started)
        return logits

    def _count(self, samples: int) -> None:
        assert self.figures.roster is not None
        chosen = (self._prefill.slots.columns(slot)[:, :samples] != 0 for slot in self._gates)
        self.figures.roster.experts += sum(int(gates.any(axis=1).sum()) for gates in chosen)
        self.figures.roster.tokens += 1

    def _require_possible(self, samples: int, roots: set[str]) -> None:
        if not 1 <= samples <= self._prefill.tokens:
            raise UserError(
                f"a roster of {samples} is not possible",
                f"prefill functions take {self._prefill.tokens} tokens",
                "give fewer, or convert with a larger --prefill",
            )
        if "noise" not in roots:
            raise UserError(
                f"the routers in {self.shards.folder} take no noise", do="convert with --roster"
            )
        if roots & set(ONE_WAY):
            raise UserError(
                f"a roster is not possible with {self.manifest.family}",
                "samples of one token would go into its states one after the other",
            )


def _outputs(lane: Lane) -> set[str]:
    calls = (call for call in lane.calls if isinstance(call, Call))
    return {port.slot for call in calls for port in call.entry.ports.outputs}


def averaged(logits: np.ndarray) -> np.ndarray:
    """Logits fp64 `[V]` of the averaged probabilities of samples `[n, V]`: the first sample's,
    shifted by what the others change. Equal samples change nothing, to the last bit."""
    exact = logits.astype(np.float64)
    highest = exact.max(axis=1, keepdims=True)
    logs = exact - highest
    logs -= np.log(np.exp(logs).sum(axis=1, keepdims=True))  # of probabilities
    most = logs.max(axis=0)
    return exact[0] + ((most - logs[0]) + np.log(np.exp(logs - most).mean(axis=0)))


def read_schedule(path: Path) -> dict[int, float]:
    """What noise is multiplied by, of each layer: a JSON object of numbers. Raises UserError."""
    found: Any = read_json(path)
    sound = isinstance(found, dict) and all(
        layer.isdecimal() and isinstance(scale, int | float) for layer, scale in found.items()
    )
    if not sound or not found:
        raise UserError(f"{path} is no schedule", do='write it as {"0": 0.1, "1": 0.2}')
    return {int(layer): float(scale) for layer, scale in found.items()}


def _scales(options: RosterOptions, layers: list[int]) -> dict[int, float]:
    """What noise is multiplied by in each of the `layers` with experts."""
    if unknown := sorted(set(options.schedule) - set(layers)):
        raise UserError(f"layer {unknown[0]} has no router that takes noise", do=f"of {layers}")
    scales = options.schedule or dict.fromkeys(layers, options.tau)
    if wrong := [scale for scale in scales.values() if not 0 <= scale < math.inf]:
        raise UserError(f"noise is not multiplied by {wrong[0]}", do="give 0 or more")
    if options.skip_layers < 0:
        raise UserError(f"{options.skip_layers} layers cannot be left out")
    skipped = options.skip_layers
    disturbed = layers[skipped : len(layers) - skipped]
    return {layer: scales.get(layer, 0.0) for layer in disturbed}
