"""What of a model is planned, as the options ask for it: which layers, in which context, with what
routers; and whether the model has that."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ane_moe.conversion.plan import ConvertOptions, lengths_of
from ane_moe.errors import UserError
from ane_moe.model.mla import MlaSpec
from ane_moe.model.spec import LayerSpec, ModelSpec, MoeSpec, RouterSpec, TrackSpec

CACHE_STEP = 32  # a state's last axis must be a multiple of it (coremltools issue 2631)
DEFAULT_CONTEXT = 2048
MAX_EXPERT_TOKENS = 1 << 14
STREAM_DIVISORS = tuple(1 << power for power in range(16))


@dataclass(frozen=True)
class Extent:
    """The model as it is planned: `layers` of it, for `context` tokens, whose caches have so many
    `slots`."""

    spec: ModelSpec
    context: int
    slots: int
    layers: tuple[int, ...]


def extent_of(spec: ModelSpec, options: ConvertOptions) -> Extent:
    """Raises UserError for what the model has not got, and for options that no model has."""
    _require_expert_functions(options)
    if options.stream_divisor not in (None, *STREAM_DIVISORS):
        raise UserError(
            f"hidden states are not divided by {options.stream_divisor}",
            do=f"give a power of two, up to {STREAM_DIVISORS[-1]}",
        )
    if options.roster:
        spec = _disturbed(spec, options.routing)
    context, layers = _context(spec, options), _layers(spec, options)
    slots = math.ceil(context / CACHE_STEP) * CACHE_STEP
    return Extent(_within(spec, context), context, slots, layers)


def _layers(spec: ModelSpec, options: ConvertOptions) -> tuple[int, ...]:
    layers = tuple(range(len(spec.layers))) if options.layers is None else options.layers
    if outside := [n for n in layers if not 0 <= n < len(spec.layers)]:
        raise UserError(
            f"the model has no layer {outside[0]}", do=f"its layers are 0-{len(spec.layers) - 1}"
        )
    if lacking := [n for n in layers if spec.source(n) not in layers]:
        raise UserError(
            f"layer {lacking[0]} reads the keys and values of layer {spec.source(lacking[0])}",
            do=f"give {spec.source(lacking[0])} to --layers too",
        )
    return layers


def _within(spec: ModelSpec, context: int) -> ModelSpec:
    """The model in such a context, without the indexers that it has no need of."""
    layers = (
        replace(layer, mixer=layer.mixer.within(context))
        if isinstance(layer.mixer, MlaSpec)
        else layer
        for layer in spec.layers
    )
    return replace(spec, layers=tuple(layers))


def blocks_of(
    tracks: TrackSpec, count: int, layers: Sequence[int], options: ConvertOptions
) -> list[tuple[range, ...]]:
    """The blocks of tracks, out of `count` layers, that make up `layers`. Raises UserError where
    they are not whole, or the host would have to call experts inside of one package."""
    if options.dispatches and options.tracks == "packed":
        raise UserError(
            "the host calls experts between layers of a track",
            "all layers of a block are in one package",
            "give --tracks apart, or --routing masked",
        )
    chosen, blocks = set(layers), []
    for block in tracks.blocks(count):
        own = {number for track in block for number in track}
        if own & chosen:
            blocks.append(block)
        if own & chosen and own - chosen:
            raise UserError(
                "tracks meet in whole blocks",
                f"{len(own & chosen)} of the layers {min(own)}-{max(own)}",
                "give all of these to --layers, or none",
            )
    return blocks


def _disturbed(spec: ModelSpec, routing: str) -> ModelSpec:
    """The model with routers that take noise. Raises UserError where none can."""
    if routing == "soft":
        raise UserError("soft routing chooses no experts", do="give another --routing")
    routers = [layer.ffn.router for layer in spec.layers if isinstance(layer.ffn, MoeSpec)]
    known = all(isinstance(router, RouterSpec) for router in routers)
    if spec.is_encoder or not routers or not known:
        raise UserError(f"a roster is not possible with {spec.family}", do="leave --roster out")
    return replace(spec, layers=tuple(_with_noise(layer) for layer in spec.layers))


def _with_noise(layer: LayerSpec) -> LayerSpec:
    ffn = layer.ffn
    if not (isinstance(ffn, MoeSpec) and isinstance(ffn.router, RouterSpec)):
        return layer
    return replace(layer, ffn=replace(ffn, router=replace(ffn.router, noise=True)))


def _context(spec: ModelSpec, options: ConvertOptions) -> int:
    if lengths := lengths_of(spec, options):
        if options.context is not None:
            raise UserError(f"{spec.family} has no context to size", do="give --lengths instead")
        return lengths[-1]
    context = min(DEFAULT_CONTEXT, spec.context) if options.context is None else options.context
    if not 1 <= context <= spec.context:
        raise UserError(
            f"a context of {context} tokens is not possible", f"the model's own is {spec.context}"
        )
    return context


def _require_expert_functions(options: ConvertOptions) -> None:
    tokens = options.expert_tokens
    if (
        list(tokens) != sorted(set(tokens))
        or not tokens
        or not 1 <= tokens[0] <= tokens[-1] <= MAX_EXPERT_TOKENS
    ):
        raise UserError(
            "the token counts of expert functions are not possible",
            ",".join(map(str, tokens)) or "none",
            f"give rising numbers from 1 to {MAX_EXPERT_TOKENS}",
        )
    if options.experts_per_function > 1 and options.routing == "stream":
        raise UserError(
            "a store is read expert by expert",
            f"{options.experts_per_function} experts of a function",
            "leave --experts-per-function out",
        )
    if options.experts_per_function < 1:
        raise UserError("an expert function needs an expert", str(options.experts_per_function))
    if options.groups and options.routing != "sparse":
        raise UserError(
            "a grouping is of expert functions",
            f"{options.routing} routing",
            "give --routing sparse",
        )
    if options.layers_per_shard < 1:
        raise UserError("a shard needs a layer", str(options.layers_per_shard))
