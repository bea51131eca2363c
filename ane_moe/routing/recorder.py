"""Recording a routing trace: from the shards of a conversion, or from Hugging Face's own model.

T = tokens of a prefill call, E = experts, k = experts per token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from ane_moe.checkpoints.checkpoint import open_checkpoint
from ane_moe.errors import UserError
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from ane_moe.manifest import FILE_NAME, Manifest
from ane_moe.model.port import GATES
from ane_moe.original.prompts import cut_passages, read_prompts
from ane_moe.progress import Progress, silent
from ane_moe.quiet_transformers import quiet_transformers
from ane_moe.routing.routing_trace import LayerRouting, RoutingTrace, by_weight

WINDOW = 512  # tokens of a passage, unless the context is shorter
MAX_TOKENS = 8192


def record(
    source: Path,
    text: Path,
    *,
    window: int | None = None,
    max_tokens: int = MAX_TOKENS,
    runtime: str = "auto",
    progress: Progress | None = None,
    **options: Any,
) -> RoutingTrace:
    """Run the conversion or the checkpoint in `source` over `text`, cut into passages of `window`
    tokens (None: 512, or the context), `max_tokens` in all. `options` go to the runtime.

    `text` is as for `read_prompts`: UTF-8, parted by lines of ---, or JSON. Raises UserError for a
    folder that is neither, text that gives no tokens, and a model without experts.
    """
    if max_tokens < 1 or (window is not None and window < 1):
        raise UserError("a trace needs tokens", f"a window of {window}, {max_tokens} in all")
    prompts = read_prompts(text, source)
    report = progress or silent
    if (source / FILE_NAME).is_file():
        return _record_shards(source, prompts, window, max_tokens, runtime, report, options)
    return _record_checkpoint(source, prompts, window, max_tokens, report)


def _passages(prompts: list[list[int]], window: int, max_tokens: int) -> list[list[int]]:
    passages = cut_passages(prompts, window, max_tokens)
    if not passages:
        raise UserError("the text holds no tokens", "an empty text", "give some text to trace")
    return passages


def _trace(
    family: str, source: str, passages: list[list[int]], layers: dict[int, LayerRouting]
) -> RoutingTrace:
    if not layers:
        raise UserError(
            "there is no routing to trace", "a model without experts", "trace a mixture of experts"
        )
    starts = np.cumsum([0, *map(len, passages[:-1])]).astype(np.int64)
    return RoutingTrace(family, source, np.concatenate(passages).astype(np.int32), starts, layers)


# -- shards
# --------------------------------------------------------------------------------------------------


def _record_shards(
    folder: Path,
    prompts: list[list[int]],
    window: int | None,
    max_tokens: int,
    runtime: str,
    progress: Progress,
    options: dict[str, Any],
) -> RoutingTrace:
    shards = load_shards(
        folder, runtime, expert_cache_bytes=psutil.virtual_memory().available // 4, **options
    )
    manifest, session = shards.manifest, Session(shards)
    passages = _passages(prompts, min(window or WINDOW, manifest.context), max_tokens)
    heard: dict[int, list[np.ndarray]] = {int(layer): [] for layer in manifest.moe}
    for number, passage in enumerate(passages):
        progress("tracing", number, len(passages))
        session.reset()
        for chunk in _chunks(passage, manifest.prefill or 1):
            session.prefill(chunk)
            for layer, gates in heard.items():
                gates.append(session.slot(f"{GATES}.{layer}").T.astype(np.float32))
    layers = {}
    for layer, chunks in heard.items():
        facts = manifest.moe[str(layer)]
        # The columns of experts, without those of classes that compute nothing.
        gates = np.concatenate(chunks)[:, : int(facts["experts"])]
        routing = _from_gates(gates, int(facts["k"]))
        size, count = expert_size(manifest, layer)
        layers[layer] = replace(routing, expert_bytes=size, expert_weights=count)
    return _trace(
        manifest.family,
        f"{manifest.routing} shards, {manifest.weights} weights, {shards.runtime} runtime",
        passages,
        layers,
    )


def _from_gates(gates: np.ndarray, k: int) -> LayerRouting:
    """The k largest of fp32 `gates [N,E]`: all there are, except with soft routing."""
    chosen = np.argsort(-gates, axis=1, kind="stable")[:, :k]
    return LayerRouting(gates.shape[1], *by_weight(chosen, np.take_along_axis(gates, chosen, 1)))


def expert_size(manifest: Manifest, layer: int) -> tuple[int, int]:
    """Bytes and number of an expert's weights, by its share of the layer's expert files: routers
    and shared experts, small beside them, are counted in. 0 where a stack holds them together with
    attention."""
    shards = manifest.shards_of("experts", layer) or manifest.shards_of("moe", layer)
    copies = [functions[0] for shard in shards for functions in shard.copies.values()]
    experts = int(manifest.moe[str(layer)]["experts"])
    stored = sum(copy.weight_bytes for copy in copies)
    return stored // experts, sum(copy.elements for copy in copies) // experts


def _chunks(ids: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for first in range(0, len(ids), size):
        yield ids[first : first + size]


# -- Hugging Face
# -------------------------------------------------------------------------------------------------


def _record_checkpoint(
    checkpoint: Path,
    prompts: list[list[int]],
    window: int | None,
    max_tokens: int,
    progress: Progress,
) -> RoutingTrace:
    from ane_moe.original.capture import Walk
    from ane_moe.original.prompts import check_prompts
    from ane_moe.original.stream import OriginalTensors, StreamedModel

    layers: dict[int, LayerRouting] = {}
    with quiet_transformers():
        stream = StreamedModel(OriginalTensors(open_checkpoint(checkpoint)))
        limit = stream.config.max_position_embeddings
        passages = _passages(prompts, min(window or WINDOW, limit), max_tokens)
        check_prompts(passages, stream.config.vocab_size, limit)

        for index, taps in Walk(stream, passages).layers(range(len(stream.layers)), progress):
            if taps[0].router is not None:
                weights, chosen = (
                    np.concatenate([tap.router[part].numpy() for tap in taps]) for part in (1, 2)
                )
                experts = taps[0].parts.experts
                assert experts is not None
                number = int(experts.num_experts)  # type: ignore[arg-type]
                count = sum(parameter.numel() for parameter in experts.parameters()) // number
                layers[index] = LayerRouting(number, *by_weight(chosen, weights), 2 * count, count)
    return _trace(stream.config.model_type, "Hugging Face model in fp32", passages, layers)
