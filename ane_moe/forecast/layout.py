"""How a model's geometry falls into packages, by the rules of `plan.make_plan`; a test holds the two together."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ane_moe.conversion.plan import (
    CACHE_STEP,
    MAX_HEAD_ROWS,
    MAX_WEIGHT_BYTES,
    MB,
    MIN_HEAD_PARTS,
    ConvertOptions,
    even_parts,
)
from ane_moe.forecast.geometry import Geometry, LayerGeometry, Matrix
from ane_moe.forecast.pieces import ExpertSet, Piece
from ane_moe.formats.recipe import Recipe, find_format


@dataclass(frozen=True)
class Stored:
    """Bytes, elements, and elements by the format's rate."""

    size: int
    weights: int
    rates: tuple[tuple[str, int], ...] = ()

    @property
    def rate(self) -> str:
        """The rate that most elements have."""
        return max(self.rates, key=lambda entry: entry[1])[0] if self.rates else "fp16"


@dataclass(frozen=True)
class Layout:
    """Turns a geometry into packages. `width` is the number of slots of the KV states."""

    geometry: Geometry
    options: ConvertOptions
    width: int

    def pieces(self) -> list[Piece]:
        """Every package."""
        found: list[Piece] = []
        for number, layer in enumerate(self.geometry.layers):
            found += [self._attention(number, layer), *self._ffn(number, layer)]
        return found + self._head()

    def _attention(self, number: int, layer: LayerGeometry) -> Piece:
        routed = self.options.routing == "sparse" and layer.experts
        plain = layer.norm + (layer.norm + layer.router if routed else 0)
        cache = 2 * (layer.cache_values * self.width + layer.state_values)
        return _piece("attn", self._stored(number, layer.mixer, plain), cache)

    def _ffn(self, number: int, layer: LayerGeometry) -> list[Piece]:
        if not layer.experts:
            return [_piece("dense", self._stored(number, layer.dense, layer.norm))]
        expert, shared = self._stored(number, layer.expert), self._stored(number, layer.shared)
        if self.options.routing == "sparse":
            return [self._functions(layer, expert, shared)]
        own = self._stored(number, (), layer.norm + layer.router)
        sizes = self._split(layer.experts, expert, _sum([own, shared]))
        parts = []
        for part, size in enumerate(sizes):
            select = size * layer.experts if len(sizes) > 1 else 0      # the one-hot matrix that picks the gates
            picked = Stored(2 * select, select, (("fp16", select),))
            parts.append(_piece("moe", _sum([own, picked, *[expert] * size, *([] if part else [shared])])))
        return parts

    def _split(self, experts: int, expert: Stored, rest: Stored) -> list[int]:
        """Experts per part."""
        limit = self.options.max_shard_mb * MB
        if rest.size + experts * expert.size <= limit:
            return [experts]
        fitting = (limit - rest.size) // (expert.size + 2 * experts)
        return even_parts(experts, math.ceil(experts / fitting)) if fitting >= 1 else [1] * experts

    def _functions(self, layer: LayerGeometry, expert: Stored, shared: Stored) -> Piece:
        all_of_them = _sum([*[expert] * layer.experts, shared])
        group = self.options.experts_per_function
        functions = math.ceil(layer.experts / group)
        per_package = max(1, (MAX_WEIGHT_BYTES - shared.size) // (group * expert.size))
        share = shared.weights / all_of_them.weights
        chosen = ExpertSet(layer.experts, layer.k, group, self.options.expert_tokens, share)
        packages = len(even_parts(functions, math.ceil(functions / per_package)))
        return Piece("experts", all_of_them.size, all_of_them.weights, all_of_them.rate, 0, packages, chosen)

    def _head(self) -> list[Piece]:
        model = self.geometry
        sizes = even_parts(model.vocab, max(MIN_HEAD_PARTS, math.ceil(model.vocab / MAX_HEAD_ROWS)))
        slices = [Matrix("head", rows, model.d_model) for rows in sizes]
        return [_piece("lm_head", _stored(self.options.recipe, None, [part], model.d_model)) for part in slices]

    def _stored(self, number: int, matrices: Iterable[Matrix], plain: int = 0) -> Stored:
        return _stored(self.options.recipe, number, matrices, plain)


def layout_of(geometry: Geometry, options: ConvertOptions, context: int) -> list[Piece]:
    """The packages of a model, converted with `options`."""
    return Layout(geometry, options, math.ceil(context / CACHE_STEP) * CACHE_STEP).pieces()


def _stored(recipe: Recipe, layer: int | None, matrices: Iterable[Matrix], plain: int) -> Stored:
    size, weights, rates = 2 * plain, plain, Counter({"fp16": plain})
    for matrix in matrices:
        choice = recipe.by_role(matrix.role, layer)
        rank = min(choice.rank, min(matrix.rows, matrix.columns) // 2)
        apart = rank * (matrix.rows + matrix.columns)                   # directions kept apart, in fp16
        size += find_format(choice.format).stored_bytes(matrix.rows, matrix.columns) + 2 * apart
        weights += matrix.weights + apart
        rates[find_format(choice.format).rate] += matrix.weights
    return Stored(size, weights, tuple(sorted(rates.items())))


def _sum(parts: Iterable[Stored]) -> Stored:
    size, weights, rates = 0, 0, Counter[str]()
    for part in parts:
        size, weights = size + part.size, weights + part.weights
        rates.update(dict(part.rates))
    return Stored(size, weights, tuple(sorted(rates.items())))


def _piece(kind: str, stored: Stored, cache_bytes: int = 0) -> Piece:
    return Piece(kind, stored.size, stored.weights, stored.rate, cache_bytes)
