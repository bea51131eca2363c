"""Run a streamed Hugging Face model over prompts, layer by layer, and keep what every block
computes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ane_moe.checkpoints.checkpoint import Checkpoint
from ane_moe.errors import UserError
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
from ane_moe.original.stream import StreamedModel
from ane_moe.original.tap import Tap
from ane_moe.progress import Progress, silent
from ane_moe.quiet_transformers import quiet_transformers


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
    """Run Hugging Face's own model over `prompts` (None: the built-in set) and write `out`
    atomically.

    `layers` are the ones to keep; those before the last of them are computed too. `experts` also
    keeps what single experts compute. Memory: one layer in fp32, the
    captured activations and the logits. Raises UserError for a bad checkpoint, ids outside the
    vocabulary, and prompts longer than `context` or the model's own.
    """
    with quiet_transformers():
        stream = StreamedModel(checkpoint)
        vocab = stream.config.vocab_size
        limit = min(
            context or stream.config.max_position_embeddings, stream.config.max_position_embeddings
        )
        ids = builtin_prompts(checkpoint.folder, vocab, limit) if prompts is None else prompts
        check_prompts(ids, vocab, limit)
        _require_layers(layers, len(stream.layers), checkpoint.folder)
        captured, logits = capture(stream, layers, ids, experts, progress or silent)
    write_golden(Golden(tuple(map(tuple, ids)), captured, logits, len(stream.layers)), out)


def _require_layers(layers: tuple[int, ...], count: int, checkpoint: Path) -> None:
    if not layers or not all(0 <= layer < count for layer in layers):
        raise UserError(
            f"{checkpoint} does not have the layers asked for",
            str(list(layers)),
            f"layers go from 0 to {count - 1}",
        )


@torch.no_grad()
def capture(
    stream: StreamedModel,
    layers: tuple[int, ...],
    prompts: list[list[int]],
    experts: bool,
    progress: Progress,
) -> tuple[dict[int, LayerGolden], np.ndarray]:
    """Activations of `layers`, and the head's fp32 logits `[N,V]` on the output of the last of
    them. With `experts` each expert also runs alone."""
    captured: dict[int, LayerGolden] = {}

    def visit(index: int, layer: torch.nn.Module, taps: list[Tap]) -> None:
        if index in layers:
            golden = _joined(taps)
            captured[index] = with_experts(taps[0].parts, golden) if experts else golden

    steps = max(layers) + 2
    carried, embedded = walk_layers(stream, max(layers) + 1, prompts, visit, progress)
    progress("original model: head", steps - 1, steps)
    embedding = stream.model.get_input_embeddings()
    with stream.loaded("head"):
        logits = []
        for number, prompt in enumerate(prompts):
            with stream.stand_ins(
                dict.fromkeys(stream.layers, carried[number]) | {embedding: embedded[number]}
            ):
                logits.append(
                    stream.model(input_ids=torch.tensor([prompt]), use_cache=False)
                    .logits[0]
                    .numpy()
                )
    progress("original model: head", steps, steps)
    return captured, np.concatenate(logits)


@torch.no_grad()
def walk_layers(
    stream: StreamedModel,
    count: int,
    prompts: list[list[int]],
    visit: Callable[[int, torch.nn.Module, list[Tap]], None],
    progress: Progress,
) -> tuple[list[Any], list[Any]]:
    """Run the first `count` layers one after the other, and call `visit` with each while it is
    loaded: its index, the layer, and what was heard of it for every prompt.

    Every prompt goes through a layer while it is loaded; the other layers' stand-ins hand on what
    the layer before it returned. Returns what the last layer and what the embedding gave, by
    prompt.
    """
    embedding = stream.model.get_input_embeddings()
    ids = [torch.tensor([prompt]) for prompt in prompts]
    progress("original model: embedding", 0, count + 1)
    with stream.loaded("embed"):
        embedded = [embedding(one) for one in ids]
    carried: list[Any] = list(embedded)
    for index in range(count):
        progress(f"original model: layer {index}", index, count + 1)
        layer = stream.layers[index]
        others = [other for other in stream.layers if other is not layer]
        taps = []
        with stream.loaded(f"layer {index}"):
            for number, one in enumerate(ids):
                tap = Tap(layer, stream.taps)
                outputs = dict.fromkeys(others, _handed_on(tap, carried[number])) | {
                    embedding: embedded[number]
                }
                with stream.stand_ins(outputs), tap:
                    stream.model.base_model(input_ids=one, use_cache=False)
                carried[number] = tap.output
                if index == 0 and stream.taps.entry:
                    tap.entering = embedded[number][0]
                taps.append(tap)
            visit(index, layer, taps)
    return carried, embedded


def _handed_on(tap: Tap, before: Any) -> Any:
    """What the layers that are not there give: what the one before gave; for the first, which has
    none before it, as much as the model's loop needs to go on."""
    return (before, None) if tap.parts.taps.carry and not isinstance(before, tuple) else before


def _joined(taps: list[Tap]) -> LayerGolden:
    prompts = [arrays_of(tap.golden()) for tap in taps]
    joined = {name: np.concatenate([prompt[name] for prompt in prompts]) for name in prompts[0]}
    return layer_of(
        joined | {name: prompts[0][name] for name in OF_THE_LAYER if name in prompts[0]}
    )
