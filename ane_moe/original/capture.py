"""Run a streamed Hugging Face model over prompts, layer by layer, and keep what every block computes."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from ane_moe.checkpoints.checkpoint import Checkpoint
from ane_moe.errors import UserError
from ane_moe.original.experts import with_experts
from ane_moe.original.golden import Golden, LayerGolden, arrays_of, layer_of, write_golden
from ane_moe.original.prompts import builtin_prompts, check_prompts
from ane_moe.original.stream import StreamedModel
from ane_moe.progress import Progress, silent
from ane_moe.quiet_transformers import quiet_transformers

# The norm in front of the feed-forward block: its input is the hidden state after attention.
FFN_NORMS = ("post_attention_layernorm", "ffn_norm")


def capture_golden(checkpoint: Checkpoint, *, layers: tuple[int, ...], prompts: list[list[int]] | None, out: Path,
                   context: int | None = None, experts: bool = False, progress: Progress | None = None) -> None:
    """Run Hugging Face's own model over `prompts` (None: the built-in set) and write `out` atomically.

    `layers` are the ones to keep; those before the last of them are computed too. `experts` also keeps what single
    experts compute. Memory: one layer in fp32, the
    captured activations and the logits. Raises UserError for a bad checkpoint, ids outside the vocabulary, and prompts
    longer than `context` or the model's own.
    """
    from ane_moe.original.capture import capture
    from ane_moe.original.stream import StreamedModel

    with quiet_transformers():
        stream = StreamedModel(checkpoint)
        vocab = stream.config.vocab_size
        limit = min(context or stream.config.max_position_embeddings, stream.config.max_position_embeddings)
        ids = builtin_prompts(checkpoint.folder, vocab, limit) if prompts is None else prompts
        check_prompts(ids, vocab, limit)
        _require_layers(layers, len(stream.layers), checkpoint.folder)
        captured, logits = capture(stream, layers, ids, experts, progress or silent)
    write_golden(Golden(tuple(map(tuple, ids)), captured, logits, len(stream.layers)), out)


def _require_layers(layers: tuple[int, ...], count: int, checkpoint: Path) -> None:
    if not layers or not all(0 <= layer < count for layer in layers):
        raise UserError(f"{checkpoint} does not have the layers asked for", str(list(layers)),
                        f"layers go from 0 to {count - 1}")


@torch.no_grad()
def capture(stream: StreamedModel, layers: tuple[int, ...], prompts: list[list[int]], experts: bool,
            progress: Progress) -> tuple[dict[int, LayerGolden], np.ndarray]:
    """Activations of `layers`, and the head's fp32 logits `[N,V]` on the output of the last of them. With `experts`
    each expert also runs alone."""
    captured: dict[int, LayerGolden] = {}

    def visit(index: int, layer: torch.nn.Module, taps: list[Tap]) -> None:
        if index in layers:
            golden = _joined(taps)
            captured[index] = with_experts(layer, ffn_norm(layer), golden) if experts else golden

    steps = max(layers) + 2
    carried, embedded = walk_layers(stream, max(layers) + 1, prompts, visit, progress)
    progress("original model: head", steps - 1, steps)
    embedding = stream.model.get_input_embeddings()
    with stream.loaded("head"):
        logits = []
        for number, prompt in enumerate(prompts):
            with stream.stand_ins(dict.fromkeys(stream.layers, carried[number]) | {embedding: embedded[number]}):
                logits.append(stream.model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0].numpy())
    progress("original model: head", steps, steps)
    return captured, np.concatenate(logits)


@torch.no_grad()
def walk_layers(stream: StreamedModel, count: int, prompts: list[list[int]],
                visit: Callable[[int, torch.nn.Module, list["Tap"]], None],
                progress: Progress) -> tuple[list[Any], list[Any]]:
    """Run the first `count` layers one after the other, and call `visit` with each while it is loaded: its index, the
    layer, and what was heard of it for every prompt.

    Every prompt goes through a layer while it is loaded; the other layers' stand-ins hand on what the layer before
    it returned. Returns what the last layer and what the embedding gave, by prompt.
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
                outputs = dict.fromkeys(others, carried[number]) | {embedding: embedded[number]}
                with stream.stand_ins(outputs), Tap(layer) as tap:
                    stream.model.base_model(input_ids=one, use_cache=False)
                carried[number] = tap.output
                taps.append(tap)
            visit(index, layer, taps)
    return carried, embedded


class Tap:
    """Listens to one run of a decoder layer: its input, the hidden state between its blocks, its router, its output."""

    def __init__(self, layer: torch.nn.Module):
        self._layer = layer
        self.x: Any = None
        self.middle: Any = None
        self.router: Any = None
        self.output: Any = None

    def __enter__(self) -> "Tap":
        layer = self._layer
        routers = [module for module in layer.modules() if type(module).__name__.endswith("Router")]
        self._handles = [
            layer.register_forward_pre_hook(lambda _, args: setattr(self, "x", args[0][0])),
            ffn_norm(layer).register_forward_pre_hook(lambda _, args: setattr(self, "middle", args[0][0])),
            layer.register_forward_hook(lambda _, args, output: setattr(self, "output", output)),
            *(router.register_forward_hook(lambda _, args, output: setattr(self, "router", output))
              for router in routers)]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()

    def golden(self) -> LayerGolden:
        output = self.output[0] if isinstance(self.output, tuple) else self.output
        probs = indices = None
        if self.router is not None:
            router_logits, _, chosen = self.router
            probs, indices = router_logits.softmax(-1).numpy(), chosen.numpy().astype(np.int32)
        return LayerGolden(self.x.numpy(), (self.middle - self.x).numpy(), (output[0] - self.middle).numpy(),
                           probs, indices)


def ffn_norm(layer: torch.nn.Module) -> torch.nn.Module:
    """The norm in front of the feed-forward block."""
    norm: torch.nn.Module = next(getattr(layer, name) for name in FFN_NORMS if hasattr(layer, name))
    return norm


def _joined(taps: list[Tap]) -> LayerGolden:
    prompts = [arrays_of(tap.golden()) for tap in taps]
    return layer_of({name: np.concatenate([prompt[name] for prompt in prompts]) for name in prompts[0]})
