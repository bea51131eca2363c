"""A model cut down to one layer of each kind: every package that it has, planned in a moment."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ane_moe.conversion.plan import ConversionPlan, ConvertOptions, sources_of
from ane_moe.conversion.planner import make_plan
from ane_moe.formats.recipe import Recipe
from ane_moe.model.spec import LayerSpec, ModelSpec, SharedGqaSpec, TrackSpec


@dataclass(frozen=True)
class KindsPlan:
    """The plan of one layer of each kind and of the head. `repeats`: how many layers of the model
    each of its layers stands for."""

    plan: ConversionPlan
    repeats: Mapping[int, int]


def plan_kinds(spec: ModelSpec, options: ConvertOptions) -> KindsPlan:
    """What `make_plan` would plan for a model, equal layers once.

    For options that treat layers alike but for the layers of their recipe: none share a shard, and
    none has a grouping, or formats of single tensors. Raises UserError as `make_plan`.
    """
    assert options.layers_per_shard == 1 and not (options.groups or options.recipe.overrides)
    if spec.tracks:
        return _plan_blocks(spec, spec.tracks, options)
    alike: dict[tuple[LayerSpec, tuple[bool, ...]], list[int]] = {}
    for number, layer in enumerate(spec.layers):
        facts = (*_entries(options.recipe, number), number in spec.lenders)
        kind = replace(layer, stored=None)  # wherever its tensors lie
        alike.setdefault((kind, facts), []).append(number)
    place = {number: index for index, own in enumerate(alike.values()) for number in own}
    firsts = (spec.layers[numbers[0]] for numbers in alike.values())
    short = replace(spec, layers=tuple(_read_from(layer, place) for layer in firsts))
    recipe = _for_layers(options.recipe, [numbers[0] for numbers in alike.values()])
    plan = make_plan(short, sources_of(short), replace(options, recipe=recipe))
    repeats = {index: len(numbers) for index, numbers in enumerate(alike.values())}
    return KindsPlan(plan, repeats)


def _read_from(layer: LayerSpec, place: Mapping[int, int]) -> LayerSpec:
    """The layer where the one whose keys and values it reads has another number."""
    if not isinstance(layer.mixer, SharedGqaSpec):
        return layer
    return replace(layer, mixer=replace(layer.mixer, source=place[layer.mixer.source]))


def _plan_blocks(spec: ModelSpec, tracks: TrackSpec, options: ConvertOptions) -> KindsPlan:
    """One block of tracks of each kind."""
    alike: dict[tuple[object, ...], list[range]] = {}
    for block in tracks.blocks(len(spec.layers)):
        numbers = range(block[0].start, block[-1].stop)
        kind = tuple((spec.layers[n], _entries(options.recipe, n)) for n in numbers)
        alike.setdefault(kind, []).append(numbers)
    kept = [n for blocks in alike.values() for n in blocks[0]]
    short = replace(spec, layers=tuple(spec.layers[n] for n in kept))
    recipe = _for_layers(options.recipe, kept)
    plan = make_plan(short, sources_of(short), replace(options, recipe=recipe))
    counts = (len(blocks) for blocks in alike.values() for _ in blocks[0])
    return KindsPlan(plan, dict(enumerate(counts)))


def _entries(recipe: Recipe, number: int) -> tuple[bool, ...]:
    """Which of the recipe's entries for layers hold for one."""
    return tuple(number in entry.layers for entry in recipe.layers)


def _for_layers(recipe: Recipe, numbers: list[int]) -> Recipe:
    """The recipe of a model that has only these layers."""
    entries = []
    for entry in recipe.layers:
        own = tuple(index for index, number in enumerate(numbers) if number in entry.layers)
        entries.append(replace(entry, layers=own))
    return replace(recipe, layers=tuple(entries))
