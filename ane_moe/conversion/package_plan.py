"""Decide what one package of a conversion holds: its functions, where its weights come from, how
they are stored, and which of them once."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, TypeVar

from ane_moe.checkpoints.adapter import LowRank
from ane_moe.checkpoints.checkpoint import TensorSource
from ane_moe.conversion.early import EarlyRows
from ane_moe.conversion.plan import OneHot, Recovery, ShardPlan, Source
from ane_moe.formats.recipe import Choice, Recipe, find_format
from ane_moe.manifest import ShardFunction
from ane_moe.model.part import PartConfig
from ane_moe.model.port import Ports
from ane_moe.model.stack import StackConfig
from ane_moe.model.template_key import TemplateKey, function_name, weight_name
from ane_moe.model.weight import (
    HEAD,
    HEAD_BIAS,
    Directions,
    Early,
    EarlyBias,
    Place,
    Selection,
    Weight,
    WeightName,
)

T = TypeVar("T")
Functions = tuple[tuple[str, int], ...]  # of a package: name and tokens of each


@dataclass(frozen=True)
class Copy:
    """One block of a package, the experts that it holds, and the same with what adapters add."""

    block: PartConfig
    experts: tuple[int, ...] = ()
    adapted: Mapping[str, PartConfig] = field(default_factory=dict)


@dataclass(frozen=True)
class _Filled:
    """A copy in its package, with what an `adapter` adds (empty: nothing): where each of its
    parameters comes from, how it is stored, and what it takes by itself. Those that are stored
    `once` lie with the weights that are named there."""

    adapter: str
    plain: str  # the copy's own prefix
    copy: Copy
    place: Place
    sources: Mapping[str, Source]
    choices: Mapping[str, Choice]
    sizes: Mapping[str, int]
    once: Mapping[str, str]

    @property
    def prefix(self) -> str:
        return function_name(self.adapter, self.plain) if self.plain else self.adapter

    @property
    def payloads(self) -> dict[str, int]:
        """What parameters take in the package."""
        return {name: 0 if name in self.once else size for name, size in self.sizes.items()}

    @property
    def shared(self) -> dict[str, str]:
        """Of those that are stored elsewhere: where."""
        return {name: self.once[name] for name in self.sources if name in self.once}

    @property
    def chosen(self) -> dict[str, Choice]:
        """Of those that are not stored as plain fp16, once each."""
        plain = Choice()
        return {
            name: choice
            for name, choice in self.choices.items()
            if choice != plain and name not in self.once
        }


@dataclass(frozen=True)
class Packing:
    """Plans the packages of a model: by where its tensors lie, the recipe and the layout, with what
    `adapters` add, by their names, and what is `early`, by layer."""

    sources: Mapping[WeightName, TensorSource]
    recipe: Recipe
    layout: str
    adapters: Mapping[str, Mapping[WeightName, LowRank]]
    early: Mapping[int, EarlyRows]

    def package(
        self,
        path: str,
        kind: str,
        layer: int | None,
        copies: Mapping[str, Copy],
        functions: Functions,
        *,
        scope: str = "",
        layers: tuple[int, ...] = (),
        rows: tuple[int, int] | None = None,
        **facts: Any,
    ) -> ShardPlan:
        """A package of `copies`, by their prefixes, each with these functions. `rows` of the
        vocabulary are those of a slice of the head."""
        alone = () if layer is None else (layer,)
        first: dict[Source, str] = {}  # of weights that stand in base and adapters alike
        filled: list[_Filled] = []
        for adapter, prefix, copy in self._copies(copies):
            place = Place(layers or alone, scope, copy.experts)
            filled.append(self._filled(adapter, prefix, copy, place, rows, first))
        payloads = _by_weight({one.prefix: one.payloads for one in filled})
        entries = [entry for one in filled for entry in self._entries(one, functions, rows)]
        return ShardPlan(
            path,
            kind,
            layer,
            tuple(entry for entry in entries if not entry.adapter),
            scope,
            layers=layers,
            adapted=tuple(entry for entry in entries if entry.adapter),
            weight_bytes=sum(payloads.values()),
            graphs={one.prefix: self._graph(one, functions) for one in filled},
            sources=_by_weight({one.prefix: one.sources for one in filled}),
            payloads=payloads,
            choices=_by_weight({one.prefix: one.chosen for one in filled}),
            shared=_by_weight({one.prefix: one.shared for one in filled}),
            **facts,
        )

    def _filled(
        self,
        adapter: str,
        plain: str,
        copy: Copy,
        place: Place,
        rows: tuple[int, int] | None,
        first: dict[Source, str],
    ) -> _Filled:
        """A copy with its weights; `first`: those of copies before it, to which its own are added
        where there are adapters."""
        own = self._sources(copy, place, rows, self.adapters[adapter] if adapter else {})
        chosen = {name: self._choice(source) for name, source in own.items()}
        sizes = {name: _payload(source, chosen[name]) for name, source in own.items()}
        filled = _Filled(adapter, plain, copy, place, own, chosen, sizes, {})
        once = {name: weight_name(filled.prefix, same) for name, same in _shared(own).items()}
        sizes |= dict.fromkeys(once, 0)
        if self.adapters:
            once = _again(own, filled.prefix, first, once)
        return replace(filled, once=once)

    def _graph(self, filled: _Filled, functions: Functions) -> TemplateKey:
        return TemplateKey(filled.copy.block, functions, self.layout)

    def _entries(
        self, filled: _Filled, functions: Functions, rows: tuple[int, int] | None
    ) -> Iterator[ShardFunction]:
        """What the manifest says of the functions of a copy."""
        graph, layers = self._graph(filled, functions), filled.place.layers
        for name, tokens in functions:
            part = graph.block_of(name)
            yield ShardFunction(
                function_name(filled.plain, name),
                tokens,
                _ports(part, tokens, layers, rows, self.layout),
                adapter=filled.adapter,
                layers=_run(part, layers),
                **_work(part, filled),
            )

    def _copies(self, copies: Mapping[str, Copy]) -> Iterator[tuple[str, str, Copy]]:
        """Each copy, and after all of them each again with what an adapter adds: the adapter, and
        the prefix."""
        for prefix, copy in copies.items():
            yield "", prefix, copy
        for adapter in self.adapters:
            for prefix, copy in copies.items():
                if adapter in copy.adapted:
                    yield adapter, prefix, Copy(copy.adapted[adapter], copy.experts)

    def _sources(
        self,
        copy: Copy,
        place: Place,
        vocab_rows: tuple[int, int] | None,
        low_ranks: Mapping[WeightName, LowRank],
    ) -> dict[str, Source]:
        """Where the parameters of a block come from, in its own order. A slice of the head has its
        `vocab_rows`; an adapter adds `low_ranks`."""
        sources: dict[str, Source] = {}
        for row in copy.block.rows():
            match row:
                case Weight(path):
                    whole = self.sources[place.name(path)]
                    by_row = whole.name in (HEAD, HEAD_BIAS)
                    sources[path] = whole.part(*vocab_rows) if vocab_rows and by_row else whole
                case Selection(path, (count, total)):
                    sources[path] = OneHot(count, total, copy.experts[0])
                case Early(path):
                    sources[path] = self.early[place.layers[0]]
                case EarlyBias(path):
                    bias = self.early[place.layers[0]].bias
                    assert bias is not None
                    sources[path] = bias
                case Directions(path, of, rank, side):
                    beside = sources[of]
                    assert isinstance(beside, TensorSource)
                    own = apart(self.sources[beside.name], self.recipe)
                    added = low_ranks.get(beside.name)
                    cut = vocab_rows if beside.name == HEAD and added else None
                    sources[path] = Recovery(beside, own, side, rank - own, added, cut)
        return sources

    def _choice(self, source: Source) -> Choice:
        if not isinstance(source, TensorSource):
            return Choice()
        return self.recipe.choice(source.name, source.role)


def _by_weight(copies: Mapping[str, Mapping[str, T]]) -> dict[str, T]:
    """Values of the parameters of each copy, by its prefix: by the names of weights in the
    package."""
    return {
        weight_name(prefix, name): value
        for prefix, values in copies.items()
        for name, value in values.items()
    }


def apart(source: TensorSource, recipe: Recipe) -> int:
    """Directions kept apart from a tensor: never more than half of those it has."""
    return recipe.choice(source.name, source.role).directions(source.shape)


def _shared(sources: Mapping[str, Source]) -> dict[str, str]:
    """Weights of several layers that are one tensor of the checkpoint, and stay fp16: each by the
    first of them."""
    first: dict[TensorSource, str] = {}
    shared = {}
    for name, source in sources.items():
        if isinstance(source, TensorSource) and source.role is None:
            same = replace(source, name=source.name.in_layer(None))
            if first.setdefault(same, name) != name:
                shared[name] = first[same]
    return shared


def _again(
    sources: Mapping[str, Source], prefix: str, first: dict[Source, str], once: Mapping[str, str]
) -> dict[str, str]:
    """What is `once` in a package, with those weights that another copy of it (`first`) has too:
    all of the base, for an adapter's functions."""
    known = dict(once)
    for name, source in sources.items():
        unique = weight_name(prefix, name)
        if name not in once and first.setdefault(source, unique) != unique:
            known[name] = first[source]
    return known


def _payload(source: Source, choice: Choice) -> int:
    """Bytes that a weight takes in the weight file, metadata aside."""
    if choice == Choice():
        return 2 * math.prod(source.shape)
    return find_format(choice.format).stored_bytes(*source.shape)


@cache
def _ports(
    block: PartConfig,
    tokens: int,
    layers: tuple[int, ...],
    rows: tuple[int, int] | None,
    layout: str,
) -> Ports:
    """Of all the expert functions of a layer, few have ports of their own."""
    return block.ports(tokens).at(layers, rows, layout)


def _run(part: PartConfig, layers: tuple[int, ...]) -> tuple[int, ...]:
    """Which of the layers a function goes through, where it is not all of them."""
    if not isinstance(part, StackConfig) or part.run is None:
        return ()
    return layers[slice(*part.run)]


def _work(part: PartConfig, filled: _Filled) -> dict[str, Any]:
    """What the manifest says of a call of one function: its experts, and the weights it works
    through."""
    elements: Counter[str] = Counter()
    names = [row.path for row in part.rows()]
    for name in names:
        elements[filled.choices[name].format] += math.prod(filled.sources[name].shape)
    rate = find_format(elements.most_common(1)[0][0]).rate if elements else "fp16"
    return {
        "experts": filled.copy.experts,
        "elements": elements.total(),
        "weight_bytes": sum(filled.sizes[name] for name in names),
        "rate": rate,
    }
