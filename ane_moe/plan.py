"""What a conversion will write: one ShardPlan per package, decided from the ModelSpec and the options alone."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from ane_moe.blocks.attention import AttentionConfig
from ane_moe.blocks.head import HeadConfig
from ane_moe.blocks.mlp import DenseConfig
from ane_moe.blocks.moe import MoeConfig
from ane_moe.blocks.ports import Shape
from ane_moe.blocks.registry import BlockConfig, TemplateKey, build_unbound
from ane_moe.checkpoint import TensorSource
from ane_moe.errors import UserError
from ane_moe.spec import MlpSpec, ModelSpec, MoeSpec

MB = 1_000_000
CACHE_STEP = 32                 # a state's last axis must be a multiple of it (coremltools issue 2631)
MAX_WEIGHT_BYTES = 1 << 31      # Core ML refuses larger weight files (coremltools PR 2593)
MAX_HEAD_ROWS = 16_384          # widest axis of the M1 to M3 engines (ane-guide, appendix A)
MIN_HEAD_PARTS = 2
DEFAULT_CONTEXT = 2048


@dataclass(frozen=True)
class ConvertOptions:
    """How to convert. `context` None: 2048 or the model's own if that is less. `prefill` 0: no prefill functions.
    `layers` None: all. `max_shard_mb` limits MoE shards; it is in MB of 10^6 bytes."""

    routing: Literal["masked", "soft"] = "masked"
    state: Literal["mlstate", "explicit"] = "mlstate"
    layout: Literal["bc1s", "bct1"] = "bc1s"
    context: int | None = None
    prefill: int = 64
    max_shard_mb: int = 220
    layers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class OneHot:
    """A weight that selects: row i of `(rows, columns)` has its 1 at column `first + i`."""

    rows: int
    columns: int
    first: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns


@dataclass(frozen=True)
class ShardPlan:
    """One package: its graph, where each of its weights comes from, and why it was cut as it is."""

    path: str
    kind: str
    layer: int | None
    template: TemplateKey
    weights: Mapping[str, TensorSource | OneHot]
    weight_bytes: int
    part: int = 0
    parts: int = 1
    experts: tuple[int, ...] = ()
    rows: tuple[int, int] | None = None
    rope: str | None = None
    window: int | None = None
    reason: str = ""


@dataclass(frozen=True)
class ConversionPlan:
    spec: ModelSpec
    options: ConvertOptions
    context: int
    cache_width: int
    layers: tuple[int, ...]
    shards: tuple[ShardPlan, ...]

    @property
    def functions(self) -> tuple[tuple[str, int], ...]:
        """(name, tokens) of every package's functions."""
        return _functions(self.options)

    @property
    def embed_bytes(self) -> int:
        return self.spec.vocab * self.spec.d_model * 2

    @property
    def largest_weight_bytes(self) -> int:
        """The largest piece a converting process holds at once."""
        return max(2 * math.prod(source.shape) for shard in self.shards for source in shard.weights.values())

    @property
    def disk_bytes(self) -> int:
        """What the conversion takes on disk, goldens and tokenizer aside."""
        return sum(shard.weight_bytes for shard in self.shards) + self.embed_bytes


def parse_layers(text: str) -> tuple[int, ...]:
    """Layer numbers of a list such as `0-3` or `0,5,7-8`. Raises UserError when it is none."""
    numbers: set[int] = set()
    for piece in text.split(","):
        found = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", piece.strip())
        if found is None:
            raise UserError("--layers takes a list of layers", repr(text), "write for instance 0-3 or 0,5,7-8")
        numbers |= set(range(int(found[1]), int(found[2] or found[1]) + 1))
    return tuple(sorted(numbers))


def make_plan(spec: ModelSpec, sources: Mapping[str, TensorSource], options: ConvertOptions) -> ConversionPlan:
    """Cut the model into shards.

    Raises UserError for a context or a layer the model does not have, and for a shard that cannot be cut below 2 GiB.
    """
    context = _context(spec, options)
    layers = tuple(range(len(spec.layers))) if options.layers is None else options.layers
    if outside := [n for n in layers if not 0 <= n < len(spec.layers)]:
        raise UserError(f"the model has no layer {outside[0]}", do=f"its layers are 0-{len(spec.layers) - 1}")
    width = math.ceil(context / CACHE_STEP) * CACHE_STEP
    planner = _Planner(spec, sources, options, width)
    shards = [shard for n in layers for shard in (planner.attention(n), *planner.ffn(n))]
    if len(layers) == len(spec.layers):
        shards += planner.head()
    return ConversionPlan(spec, options, context, width, layers, tuple(shards))


def _context(spec: ModelSpec, options: ConvertOptions) -> int:
    context = min(DEFAULT_CONTEXT, spec.context) if options.context is None else options.context
    if not 1 <= context <= spec.context:
        raise UserError(f"a context of {context} tokens is not possible", f"the model's own is {spec.context}")
    return context


def _functions(options: ConvertOptions) -> tuple[tuple[str, int], ...]:
    return (("decode", 1), *((("prefill", options.prefill),) if options.prefill else ()))


@dataclass(frozen=True)
class _Planner:
    spec: ModelSpec
    sources: Mapping[str, TensorSource]
    options: ConvertOptions
    slots: int

    def attention(self, layer: int) -> ShardPlan:
        mixer = self.spec.layers[layer].mixer
        rotary = len(self.spec.ropes[mixer.rope].inv_freq) if mixer.rope else 0
        config = AttentionConfig(
            self.spec.d_model, self.spec.norm, mixer, rotary, self.slots, self.options.state == "explicit"
        )
        path = f"attn/layer_{layer:02d}.mlpackage"
        return self._shard(path, "attn", layer, config, rope=mixer.rope, window=mixer.window)

    def ffn(self, layer: int) -> list[ShardPlan]:
        ffn = self.spec.layers[layer].ffn
        if isinstance(ffn, MlpSpec):
            dense = DenseConfig(self.spec.d_model, self.spec.norm, ffn)
            return [self._shard(f"dense/layer_{layer:02d}.mlpackage", "dense", layer, dense)]
        sizes, reason = self._split(ffn)
        shards, first = [], 0
        for part, size in enumerate(sizes):
            suffix = f"_part_{part + 1}" if len(sizes) > 1 else ""
            path = f"moe/layer_{layer:02d}{suffix}.mlpackage"
            experts = tuple(range(first, first + size))
            config = self._moe(ffn, size, part == 0)
            facts = {"part": part, "parts": len(sizes), "experts": experts, "reason": reason}
            shards.append(self._shard(path, "moe", layer, config, **facts))
            first += size
        return shards

    def head(self) -> list[ShardPlan]:
        least = max(MIN_HEAD_PARTS, math.ceil(self.spec.vocab / MAX_HEAD_ROWS))
        sizes = _even_parts(self.spec.vocab, least)
        shards, first = [], 0
        for part, rows in enumerate(sizes):
            config = HeadConfig(self.spec.d_model, self.spec.norm, rows, self.spec.head.bias)
            path, reason = f"lm_head/part_{part}.mlpackage", f"at most {MAX_HEAD_ROWS} output rows a slice"
            facts = {"part": part, "parts": len(sizes), "rows": (first, first + rows), "reason": reason}
            shards.append(self._shard(path, "lm_head", None, config, **facts))
            first += rows
        return shards

    def _moe(self, moe: MoeSpec, experts: int, first: bool) -> MoeConfig:
        return MoeConfig(self.spec.d_model, self.spec.norm, moe, experts, first, self.options.routing == "soft")

    def _split(self, moe: MoeSpec) -> tuple[list[int], str]:
        """Experts per part, and why: the fewest parts within the limit, equal ones where that costs few more."""
        limit, experts = self.options.max_shard_mb * MB, moe.router.experts
        whole = _weight_bytes(self._moe(moe, experts, True))
        if whole <= limit:
            return [experts], ""
        one, two = (_weight_bytes(self._moe(moe, n, True)) for n in (1, 2))
        fitting = 1 + (limit - one) // (two - one)
        reason = f"{whole / MB:.0f} MB in one piece, limit {self.options.max_shard_mb} MB"
        if fitting < 1:
            return [1] * experts, f"{reason}; one expert alone is above it"
        return _even_parts(experts, math.ceil(experts / fitting)), reason

    def _shard(self, path: str, kind: str, layer: int | None, config: BlockConfig, **facts: Any) -> ShardPlan:
        weight_bytes = _weight_bytes(config)
        if weight_bytes > MAX_WEIGHT_BYTES:
            raise UserError(f"{path} would hold {weight_bytes / MB:.0f} MB", "Core ML's limit is 2 GiB a package")
        key = TemplateKey(config, _functions(self.options), self.options.layout)
        plan = ShardPlan(path, kind, layer, key, {}, weight_bytes, **facts)
        weights = {name: self._source(plan, name, shape) for name, shape in _weight_shapes(config).items()}
        return ShardPlan(**{**vars(plan), "weights": weights})

    def _source(self, plan: ShardPlan, name: str, shape: Shape) -> TensorSource | OneHot:
        """Where the block's parameter `name` comes from: our tensor of the same layer, or a slice of it."""
        if name == "select.weight":
            return OneHot(shape[0], shape[1], plan.experts[0])
        if plan.kind == "lm_head":
            return self.sources["head.norm.weight"] if name == "norm.weight" else self._head_rows(plan)
        part = "attn" if plan.kind == "attn" else "ffn"
        if name.startswith("experts."):
            _, index, rest = name.split(".", 2)
            name = f"experts.{plan.experts[int(index)]}.{rest}"
        return self.sources[f"layers.{plan.layer}.{part}.{name.removeprefix('mlp.')}"]


    def _head_rows(self, plan: ShardPlan) -> TensorSource:
        assert plan.rows is not None
        return self.sources["head.weight"].part(*plan.rows)


def _even_parts(total: int, least: int) -> list[int]:
    """Sizes of at least `least` parts: equal ones if a divisor is near (one graph serves all), else nearly equal."""
    for parts in range(least, 2 * least + 1):
        if total % parts == 0:
            return [total // parts] * parts
    size = math.ceil(total / least)
    return [size] * (total // size) + ([total % size] if total % size else [])


@lru_cache
def _weight_shapes(config: BlockConfig) -> dict[str, Shape]:
    return {name: tuple(parameter.shape) for name, parameter in build_unbound(config).named_parameters()}


def _weight_bytes(config: BlockConfig) -> int:
    return sum(2 * math.prod(shape) for shape in _weight_shapes(config).values())
