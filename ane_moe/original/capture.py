"""Run Hugging Face's own model over prompts, layer by layer, and keep what every block computes.

For a conversion whose weights are compressed also the model as it is stored goes along: each layer
is read once from the checkpoint and once from the packages, every prompt goes through both, and the
layer is dropped.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ane_moe.checkpoints.checkpoint import Checkpoint
from ane_moe.errors import UserError
from ane_moe.files import scratch_folder
from ane_moe.kept import Kept
from ane_moe.original.experts import with_experts
from ane_moe.original.golden import (
    OF_THE_LAYER,
    Golden,
    LayerGolden,
    arrays_of,
    layer_of,
    write_golden,
)
from ane_moe.original.prompts import builtin_prompts, check_prompts
from ane_moe.original.stored_weights import RoleError, StoredTensors
from ane_moe.original.stream import OriginalTensors, StreamedModel
from ane_moe.original.tap import Tap
from ane_moe.progress import Progress, silent
from ane_moe.quiet_transformers import quiet_transformers

_LABELS = ("original model", "model as it is stored")


def capture_golden(
    checkpoint: Checkpoint,
    *,
    layers: tuple[int, ...],
    prompts: list[list[int]] | None,
    out: Path,
    context: int | None = None,
    experts: bool = False,
    progress: Progress | None = None,
) -> None:
    """Run the model over `prompts` (None: the built-in set) and write `out` atomically.

    `layers` are the ones to keep; those before the last of them are computed too. `experts` also
    keeps what single experts compute. Memory: one layer as it is stored, the
    captured activations and the logits. Raises UserError for a bad checkpoint, ids outside the
    vocabulary, and prompts longer than `context` or the model's own.
    """
    with quiet_transformers():
        stream = StreamedModel(OriginalTensors(checkpoint))
        ids = prompts_for(stream, prompts, context)
        with scratch_folder(out.parent, "golden") as scratch:
            (golden,) = capture(
                [stream], layers, ids, Kept(scratch), experts=experts, progress=progress or silent
            )
            write_golden(golden, out)


def prompts_for(
    stream: StreamedModel, prompts: list[list[int]] | None, context: int | None
) -> list[list[int]]:
    """`prompts`, or the built-in ones; raises UserError where the model cannot take them."""
    vocab, own = stream.config.vocab_size, stream.config.max_position_embeddings
    limit = min(context or own, own)
    ids = builtin_prompts(stream.folder, vocab, limit) if prompts is None else prompts
    check_prompts(ids, vocab, limit)
    return ids


class Walk:
    """Prompts on their way through a streamed model.

    Every prompt goes through a layer while it is loaded; the other layers' stand-ins hand on what
    they returned before, as far as that is still read.
    """

    def __init__(self, stream: StreamedModel, prompts: Sequence[Sequence[int]]):
        self.stream = stream
        self._ids = [torch.tensor([prompt]) for prompt in prompts]
        self._embedding = stream.model.get_input_embeddings()
        with stream.loaded("embed"), torch.no_grad():
            self._embedded = [self._embedding(one) for one in self._ids]
        # Of each layer the last one that reads what it gives.
        self._last_read = {
            place: layer for layer in range(len(stream.layers) + 1) for place in stream.reads(layer)
        }
        # By prompt what layers gave that others read, the last one's last.
        self.carried: list[dict[int, Any]] = [{-1: embedded} for embedded in self._embedded]

    def layers(self, indices: Iterable[int], progress: Progress) -> Iterator[tuple[int, list[Tap]]]:
        """Go through layers one after the other, each loaded while the caller looks at it: its
        index, and what was heard of it for every prompt."""
        order = list(indices)
        for number, index in enumerate(order):
            progress(f"original model: layer {index}", number, len(order) + 1)
            with self.layer(index) as taps:
                yield index, taps

    @contextmanager
    def layer(self, index: int) -> Iterator[list[Tap]]:
        """Take every prompt through a layer, which stays loaded inside the block."""
        theirs, piece = divmod(index, self.stream.taps.each)
        with self.stream.loaded(f"layer {theirs}"), torch.no_grad():
            yield [self._through(theirs, piece, number) for number in range(len(self._ids))]

    def _through(self, index: int, piece: int, number: int) -> Tap:
        stream, layer = self.stream, self.stream.layers[index]
        tap = Tap(layer, stream.taps, stream.config.hidden_size, piece)
        outputs = self._outputs(number, tap)
        del outputs[layer]
        with stream.stand_ins(outputs), tap:
            stream.base(input_ids=self._ids[number], use_cache=False)
        if piece + 1 == stream.taps.each:
            held = self.carried[number].items()
            read = {place: one for place, one in held if self._last_read[place] > index}
            self.carried[number] = read | {index: tap.output}
        if index == 0 and stream.taps.entry:
            tap.entering = self._embedded[number][0]
        return tap

    def _outputs(self, number: int, tap: Tap | None = None) -> dict[torch.nn.Module, Any]:
        """What stand-ins for all layers, and for the embedding, return for a prompt: what is held
        of them, or what is as good, since nobody reads it."""
        carried = self.carried[number]
        *_, last = carried.values()
        outputs = {
            layer: _handed_on(tap, carried.get(place, last))
            for place, layer in enumerate(self.stream.layers)
        }
        return outputs | {self._embedding: self._embedded[number]}

    def final(self) -> list[Any]:
        """What the head is given, by prompt."""
        read = self.stream.reads(len(self.stream.layers))
        given = []
        for carried in self.carried:
            *_, last = carried.values()
            given.append(self.stream.together([carried.get(place, last) for place in read]))
        return given

    def logits(self) -> np.ndarray:
        """The head's fp32 logits `[N,V]` on what the last layers gave."""
        stream, logits = self.stream, []
        with stream.loaded("head"), torch.no_grad():
            for number, ids in enumerate(self._ids):
                with stream.stand_ins(self._outputs(number)):
                    logits.append(stream.model(input_ids=ids, use_cache=False).logits[0].numpy())
        return np.concatenate(logits)


@dataclass(frozen=True)
class CapturedLayers(Mapping[int, LayerGolden]):
    """The layers of the golden of one of the models, read when they are asked for."""

    kept: Kept
    indices: tuple[int, ...]
    model: int

    def __getitem__(self, index: int) -> LayerGolden:
        if index not in self.indices:
            raise KeyError(index)
        result = self.kept.load(_step(index))
        assert result is not None
        arrays = result["goldens"][self.model]
        return layer_of({name: value.numpy() for name, value in arrays.items()})

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


@torch.no_grad()
def capture(
    streams: Sequence[StreamedModel],
    layers: tuple[int, ...],
    prompts: Sequence[Sequence[int]],
    kept: Kept,
    *,
    experts: bool = False,
    stored: StoredTensors | None = None,
    through: Sequence[int] | None = None,
    progress: Progress = silent,
) -> tuple[Golden, ...]:
    """A golden of each model, whose layers lie in `kept`; layers that are there already are not run
    again.

    With `experts` each expert also runs alone. `stored` are the tensors of one of the models, whose
    errors are kept as well. Prompts go `through` these layers only (None: all up to the last of
    `layers`). Raises UserError when the models lack one of the layers.
    """
    _require_layers(layers, streams[0].count, streams[0].folder)
    walks = [Walk(stream, prompts) for stream in streams]
    order = tuple(range(max(layers) + 1) if through is None else through)
    done, total = _resume(walks, order, kept, stored), (len(order) + 1) * len(walks)
    for place, index in enumerate(order[done:], done):
        goldens = []
        for number, walk in enumerate(walks):
            progress(f"{_LABELS[number]}: layer {index}", place * len(walks) + number, total)
            with walk.layer(index) as taps:
                if index in layers:
                    golden = _joined(taps)
                    goldens.append(with_experts(taps[0].parts, golden) if experts else golden)
        _keep(index, goldens, walks, kept, stored)
    found = []
    for number, walk in enumerate(walks):
        progress(f"{_LABELS[number]}: head", len(order) * len(walks) + number, total)
        held, count = CapturedLayers(kept, layers, number), walk.stream.count
        final = None
        if len(walk.stream.reads(len(walk.stream.layers))) > 1:
            final = np.concatenate([one[0].numpy() for one in walk.final()])
        found.append(Golden(tuple(map(tuple, prompts)), held, walk.logits(), count, final))
    return tuple(found)


def _require_layers(layers: tuple[int, ...], count: int, checkpoint: Path) -> None:
    if not layers or not all(0 <= layer < count for layer in layers):
        raise UserError(
            f"{checkpoint} does not have the layers asked for",
            str(list(layers)),
            f"layers go from 0 to {count - 1}",
        )


def _step(index: int) -> str:
    return f"layer_{index:03d}"


def _keep(
    index: int,
    goldens: Sequence[LayerGolden],
    walks: Sequence[Walk],
    kept: Kept,
    stored: StoredTensors | None,
) -> None:
    arrays = [arrays_of(golden) for golden in goldens]
    tensors = [
        {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in own.items()}
        for own in arrays
    ]
    errors = {role: vars(error) for role, error in stored.errors.items()} if stored else {}
    carried = [walk.carried for walk in walks]
    kept.save(_step(index), {"goldens": tensors, "carried": carried, "errors": errors})


def _resume(
    walks: Sequence[Walk], order: Sequence[int], kept: Kept, stored: StoredTensors | None
) -> int:
    """How many layers were run already; the walks and the errors go on from the last of them."""
    done = 0
    last: dict[str, Any] | None = None
    while done < len(order) and (found := kept.load(_step(order[done]))) is not None:
        done, last = done + 1, found
    if last is not None:
        for walk, carried in zip(walks, last["carried"], strict=True):
            walk.carried = list(carried)
        if stored is not None:
            stored.errors = {role: RoleError(**error) for role, error in last["errors"].items()}
    return done


def _handed_on(tap: Tap | None, before: Any) -> Any:
    """What a layer that is not there gives; for the first, which has none before it, as much as the
    model's loop needs to go on."""
    taps = tap.parts.taps if tap else None
    pairs = taps and (taps.carry or taps.hands_on)
    return (before, None) if pairs and not isinstance(before, tuple) else before


def _joined(taps: list[Tap]) -> LayerGolden:
    prompts = [arrays_of(tap.golden()) for tap in taps]
    joined = {name: np.concatenate([prompt[name] for prompt in prompts]) for name in prompts[0]}
    return layer_of(
        joined | {name: prompts[0][name] for name in OF_THE_LAYER if name in prompts[0]}
    )
