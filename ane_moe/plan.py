"""What a conversion will write: one ShardPlan per package, decided from the ModelSpec and the options alone."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

from ane_moe.blocks.attention import AttentionConfig
from ane_moe.blocks.experts import ExpertGroupConfig, SharedExpertConfig
from ane_moe.blocks.head import HeadConfig
from ane_moe.blocks.mlp import DenseConfig, MlpRanks
from ane_moe.blocks.moe import MoeConfig
from ane_moe.blocks.ports import Shape
from ane_moe.blocks.registry import BlockConfig, TemplateKey, build_unbound, function_name, weight_name
from ane_moe.blocks.routed import RoutedAttentionConfig
from ane_moe.blocks.stack import StackConfig
from ane_moe.checkpoint import TensorSource
from ane_moe.compress.recipe import INT8, Choice, Recipe, find_format, role_of
from ane_moe.errors import UserError
from ane_moe.spec import MlpSpec, ModelSpec, MoeSpec
from ane_moe.tensors import tensor_of

MB = 1_000_000
CACHE_STEP = 32                 # a state's last axis must be a multiple of it (coremltools issue 2631)
MAX_WEIGHT_BYTES = 1 << 31      # Core ML refuses larger weight files (coremltools PR 2593)
BLOB_OVERHEAD = 128             # bytes a stored array takes in the file beside its own: metadata and alignment
MAX_PARTS = 3                   # arrays of an encoded weight: indices or data, palettes or mask, scales
MAX_HEAD_ROWS = 16_384          # widest axis of the M1 to M3 engines (ane-guide, appendix A)
MIN_HEAD_PARTS = 2
DEFAULT_CONTEXT = 2048
ROUTERS = "router"
MAX_EXPERT_TOKENS = 1 << 14


@dataclass(frozen=True)
class ConvertOptions:
    """How to convert. `context` None: 2048 or the model's own if that is less. `prefill` 0: no prefill functions.
    `layers` None: all. `max_shard_mb` limits MoE shards; it is in MB of 10^6 bytes. For sparse routing there is a
    function for each group of `experts_per_function` experts and each token count in `expert_tokens`. Up to
    `layers_per_shard` whole layers share a shard where they fit into one of `max_shard_mb`. `recipe` says how the
    matrices are stored; `calibrate` is a text file or "builtin", whose passage through the model says which of their
    inputs matter; `budget_mb` (of 10^6 bytes, for all of OUT's weights) or `min_cosine` let it choose formats.
    `groups` gives the experts of each function by layer, where they are not neighbours.
    `ignore_tensors` are patterns (as in a shell) of stored tensors that may be left out."""

    routing: Literal["masked", "soft", "sparse"] = "masked"
    state: Literal["mlstate", "explicit"] = "mlstate"
    layout: Literal["bc1s", "bct1"] = "bc1s"
    context: int | None = None
    prefill: int = 64
    max_shard_mb: int = 220
    layers: tuple[int, ...] | None = None
    expert_tokens: tuple[int, ...] = (1, 16, 64)
    experts_per_function: int = 1
    layers_per_shard: int = 1
    recipe: Recipe = INT8
    groups: Mapping[int, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    calibrate: str | None = None
    budget_mb: float | None = None
    min_cosine: float | None = None
    ignore_tensors: tuple[str, ...] = ()


@dataclass(frozen=True)
class SourceFacts:
    """What a user should know of how the checkpoint was read: sentences, and its tensors that are
    left out, by why."""

    notes: tuple[str, ...] = ()
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


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
class Recovery:
    """One of the two thin matrices kept apart from `source`: its `rank` strongest directions, on the way in or out."""

    source: TensorSource
    rank: int
    side: Literal["in", "out"]

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.source.shape
        return (self.rank, columns) if self.side == "in" else (rows, self.rank)


Source = TensorSource | OneHot | Recovery


@dataclass(frozen=True)
class ShardPlan:
    """One package: its graphs by prefix (see `package.stamp`), where each of its weights comes from, and why it was
    cut as it is. `choices` are of the weights that are not stored as plain fp16."""

    path: str
    kind: str
    layer: int | None
    graphs: Mapping[str, TemplateKey]
    weights: Mapping[str, Source]
    choices: Mapping[str, Choice] = field(default_factory=dict)
    part: int = 0
    parts: int = 1
    experts: tuple[int, ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()
    layers: tuple[int, ...] = ()
    rows: tuple[int, int] | None = None
    rope: str | None = None
    window: int | None = None
    states: Mapping[str, Shape] = field(default_factory=dict)
    reason: str = ""

    @cached_property
    def payloads(self) -> dict[str, int]:
        """Bytes that each weight takes in the weight file, metadata aside."""
        return {name: find_format(self.choices[name].format).stored_bytes(*source.shape) if name in self.choices
                else 2 * math.prod(source.shape) for name, source in self.weights.items()}  # fmt: skip

    @property
    def weight_bytes(self) -> int:
        return sum(self.payloads.values())

    @property
    def file_bytes(self) -> int:
        """What the weight file takes at most."""
        return self.weight_bytes + BLOB_OVERHEAD * (len(self.weights) + MAX_PARTS * len(self.choices))

    @property
    def functions(self) -> tuple[tuple[str, int], ...]:
        """(name, tokens) of the package's functions."""
        return tuple((function_name(prefix, name), tokens)
                     for prefix, graph in self.graphs.items() for name, tokens in graph.functions)  # fmt: skip


@dataclass(frozen=True)
class ConversionPlan:
    spec: ModelSpec
    options: ConvertOptions
    context: int
    cache_width: int
    layers: tuple[int, ...]
    shards: tuple[ShardPlan, ...]
    source: SourceFacts = SourceFacts()

    @property
    def functions(self) -> tuple[tuple[str, int], ...]:
        """(name, tokens) of every package's functions, but for those of experts."""
        return _functions(self.options)

    @property
    def embed_format(self) -> str:
        return self.options.recipe.choice("embed.weight").format

    @property
    def embed_bytes(self) -> int:
        return find_format(self.embed_format).stored_bytes(self.spec.vocab, self.spec.d_model)

    @property
    def matrices(self) -> dict[int | None, list[TensorSource]]:
        """The matrices that have a role, whole, by layer (None: the head)."""
        found: dict[str, TensorSource] = {}
        for shard in self.shards:
            for source in shard.weights.values():
                if isinstance(source, TensorSource) and role_of(source.name)[0]:
                    whole = replace(source, rows=None) if source.name == "head.weight" else source
                    found.setdefault(source.name, whole)
        by_layer: dict[int | None, list[TensorSource]] = {}
        for source in found.values():
            by_layer.setdefault(role_of(source.name)[1], []).append(source)
        return by_layer

    @property
    def largest_weight_bytes(self) -> int:
        """The largest piece a converting process holds at once."""
        return max(2 * math.prod(source.shape) for shard in self.shards for source in shard.weights.values())

    @property
    def disk_bytes(self) -> int:
        """What the conversion takes on disk, goldens and tokenizer aside."""
        return sum(shard.weight_bytes for shard in self.shards) + self.embed_bytes

    @property
    def routers(self) -> dict[int, str]:
        """Paths of the router tables that guesses of the host read, by layer."""
        return {n: f"{ROUTERS}/layer_{n:02d}.bin" for n in self.layers
                if self.options.routing == "sparse" and isinstance(self.spec.layers[n].ffn, MoeSpec)}  # fmt: skip


def parse_expert_tokens(text: str) -> tuple[int, ...]:
    """Token counts of a list such as `1,16,64`. Raises UserError when it is none."""
    if re.fullmatch(r" *[1-9]\d{0,4}( *, *[1-9]\d{0,4})* *", text) is None:
        raise UserError("--expert-tokens takes a list of token counts", repr(text), "write for instance 1,16,64")
    return tuple(sorted({int(piece) for piece in text.split(",")}))


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

    Raises UserError for a context or a layer the model does not have, for senseless expert functions, and for a shard
    that cannot be cut below 2 GiB.
    """
    _require_expert_functions(options)
    context = _context(spec, options)
    layers = tuple(range(len(spec.layers))) if options.layers is None else options.layers
    if outside := [n for n in layers if not 0 <= n < len(spec.layers)]:
        raise UserError(f"the model has no layer {outside[0]}", do=f"its layers are 0-{len(spec.layers) - 1}")
    width = math.ceil(context / CACHE_STEP) * CACHE_STEP
    planner = _Planner(spec, sources, options, width)
    shards = [shard for group in planner.groups(layers) for shard in planner.layers(group)]
    if len(layers) == len(spec.layers):
        shards += planner.head()
    for shard in shards:
        if shard.file_bytes > MAX_WEIGHT_BYTES:
            raise UserError(f"{shard.path} would hold {shard.weight_bytes / MB:.0f} MB",
                            "Core ML's limit is 2 GiB a package")  # fmt: skip
    return ConversionPlan(spec, options, context, width, layers, tuple(shards))


def _context(spec: ModelSpec, options: ConvertOptions) -> int:
    context = min(DEFAULT_CONTEXT, spec.context) if options.context is None else options.context
    if not 1 <= context <= spec.context:
        raise UserError(f"a context of {context} tokens is not possible", f"the model's own is {spec.context}")
    return context


def _require_expert_functions(options: ConvertOptions) -> None:
    tokens = options.expert_tokens
    if list(tokens) != sorted(set(tokens)) or not tokens or not 1 <= tokens[0] <= tokens[-1] <= MAX_EXPERT_TOKENS:
        raise UserError("the token counts of expert functions are not possible", ",".join(map(str, tokens)) or "none",
                        f"give rising numbers from 1 to {MAX_EXPERT_TOKENS}")  # fmt: skip
    if options.experts_per_function < 1:
        raise UserError("an expert function needs an expert", str(options.experts_per_function))
    if options.groups and options.routing != "sparse":
        raise UserError("a grouping is of expert functions", f"{options.routing} routing", "give --routing sparse")
    if options.layers_per_shard < 1:
        raise UserError("a shard needs a layer", str(options.layers_per_shard))


def _functions(options: ConvertOptions) -> tuple[tuple[str, int], ...]:
    return (("decode", 1), *((("prefill", options.prefill),) if options.prefill else ()))


@dataclass(frozen=True)
class _Planner:
    spec: ModelSpec
    sources: Mapping[str, TensorSource]
    options: ConvertOptions
    slots: int

    def groups(self, layers: Sequence[int]) -> list[tuple[int, ...]]:
        """Layers that share a shard: neighbours with one window and one RoPE, as many as asked for and as fit."""
        groups: list[tuple[int, ...]] = []
        for layer in layers:
            longer = (*groups[-1], layer) if groups else (layer,)
            if len(longer) > 1 and self._can_stack(longer):
                groups[-1] = longer
            else:
                groups.append((layer,))
        return groups

    def layers(self, group: tuple[int, ...]) -> list[ShardPlan]:
        """The shards of one layer, or the one of several."""
        return [self.stack(group)] if len(group) > 1 else [self.attention(group[0]), *self.ffn(group[0])]

    def stack(self, group: Sequence[int]) -> ShardPlan:
        first, config = self.spec.layers[group[0]].mixer, self._stack(group)
        reason = f"{len(group)} layers, limits {self.options.layers_per_shard} and {self.options.max_shard_mb} MB"
        path = f"stack/layer_{group[0]:02d}_to_{group[-1]:02d}.mlpackage"
        facts = {"layers": tuple(group), "rope": first.rope, "window": first.window, "states": config.caches}
        return self._shard(path, "stack", group[0], config, reason=reason, **facts)

    def _can_stack(self, group: tuple[int, ...]) -> bool:
        layers = [self.spec.layers[n] for n in group]
        if len(group) > self.options.layers_per_shard or group[-1] != group[-2] + 1:
            return False
        if self.options.routing == "sparse" and any(isinstance(layer.ffn, MoeSpec) for layer in layers):
            return False  # the host dispatches the experts between attention and the next layer
        if len({(layer.mixer.rope, layer.mixer.window) for layer in layers}) > 1:
            return False
        return self.stack(group).weight_bytes <= self.options.max_shard_mb * MB

    def _stack(self, group: Sequence[int]) -> StackConfig:
        return StackConfig(tuple((self._attention(n), self._whole_ffn(n)) for n in group))

    def _whole_ffn(self, layer: int) -> DenseConfig | MoeConfig:
        ffn = self.spec.layers[layer].ffn
        if isinstance(ffn, MoeSpec):
            return self._moe(layer, ffn, ffn.router.experts, True)
        return DenseConfig(self.spec.d_model, self.spec.norm, ffn, self._mlp_ranks(f"layers.{layer}.ffn"))

    def _mlp_ranks(self, prefix: str) -> MlpRanks:
        gate, up, down = (self._rank(f"{prefix}.{name}.weight") for name in ("gate", "up", "down"))
        return gate, up, down

    def _rank(self, tensor: str) -> int:
        """Directions kept apart from a tensor: never more than half of those it has."""
        return min(self.options.recipe.choice(tensor).rank, min(self.sources[tensor].shape) // 2)

    def _attention(self, layer: int) -> AttentionConfig:
        mixer = self.spec.layers[layer].mixer
        rotary = len(self.spec.ropes[mixer.rope].inv_freq) if mixer.rope else 0
        explicit = self.options.state == "explicit"
        q, k, v, o = (self._rank(f"layers.{layer}.attn.{name}.weight") for name in "qkvo")
        return AttentionConfig(self.spec.d_model, self.spec.norm, mixer, rotary, self.slots, explicit, (q, k, v, o))

    def attention(self, layer: int) -> ShardPlan:
        mixer, config = self.spec.layers[layer].mixer, self._attention(layer)
        ffn = self.spec.layers[layer].ffn
        routed = isinstance(ffn, MoeSpec) and self.options.routing == "sparse"
        block = RoutedAttentionConfig(config, ffn.router) if isinstance(ffn, MoeSpec) and routed else config
        facts = {"rope": mixer.rope, "window": mixer.window, "states": config.caches}
        return self._shard(f"attn/layer_{layer:02d}.mlpackage", "attn", layer, block, **facts)

    def ffn(self, layer: int) -> list[ShardPlan]:
        ffn = self.spec.layers[layer].ffn
        if isinstance(ffn, MlpSpec):
            return [self._shard(f"dense/layer_{layer:02d}.mlpackage", "dense", layer, self._whole_ffn(layer))]
        if self.options.routing == "sparse":
            return self.experts(layer, ffn)
        sizes, reason = self._split(layer, ffn)
        shards, first = [], 0
        for part, size in enumerate(sizes):
            suffix = f"_part_{part + 1}" if len(sizes) > 1 else ""
            path = f"moe/layer_{layer:02d}{suffix}.mlpackage"
            experts = tuple(range(first, first + size))
            config = self._moe(layer, ffn, size, part == 0)
            facts = {"part": part, "parts": len(sizes), "experts": experts, "reason": reason}
            shards.append(self._shard(path, "moe", layer, config, **facts))
            first += size
        return shards

    def experts(self, layer: int, moe: MoeSpec) -> list[ShardPlan]:
        """Packages of a layer's expert functions: as few as the size limit of a weight file allows."""
        groups = self._expert_groups(layer, moe.router.experts)
        functions = tuple((f"t{tokens}", tokens) for tokens in self.options.expert_tokens)
        shared: dict[str, BlockConfig] = {}
        if moe.shared is not None:
            ranks = self._mlp_ranks(f"layers.{layer}.ffn.shared")
            shared["shared"] = SharedExpertConfig(self.spec.d_model, moe.shared, ranks)

        def package(path: str, configs: dict[str, BlockConfig], **facts: Any) -> ShardPlan:
            return self._package(path, "experts", layer, configs, functions, **facts)

        def name(group: tuple[int, ...]) -> str:
            return f"expert_{group[0]:03d}"

        largest = max(package("", {name(group): self._group(layer, moe, len(group))}, groups=(group,)).file_bytes
                      for group in groups)
        room = MAX_WEIGHT_BYTES - package("", shared).file_bytes
        parts = even_parts(len(groups), math.ceil(len(groups) / max(1, room // largest)))
        shards, first = [], 0
        for part, count in enumerate(parts):
            mine = groups[first : first + count]
            configs: dict[str, BlockConfig] = {name(group): self._group(layer, moe, len(group)) for group in mine}
            suffix = f"_part_{part + 1}" if len(parts) > 1 else ""
            facts = {
                "part": part,
                "parts": len(parts),
                "experts": tuple(sorted(expert for group in mine for expert in group)),
                "groups": tuple(mine) if self.options.groups else (),
                "reason": "weight files end at 2 GiB" if suffix else "",
            }
            path = f"experts/layer_{layer:02d}{suffix}.mlpackage"
            shards.append(package(path, configs | (shared if part == 0 else {}), **facts))
            first += count
        return shards

    def _expert_groups(self, layer: int, total: int) -> list[tuple[int, ...]]:
        """Experts of each function, in the order of their first ones."""
        size, given = self.options.experts_per_function, self.options.groups
        if not given:
            return [tuple(range(first, min(first + size, total))) for first in range(0, total, size)]
        groups = sorted(given.get(layer, ()))
        if sorted(expert for group in groups for expert in group) != list(range(total)) \
                or any(group != tuple(sorted(group)) or not 0 < len(group) <= size for group in groups):
            raise UserError(f"the grouping does not fit layer {layer}", f"{len(groups)} groups for {total} experts",
                            "make it from a trace of this model")
        return groups

    def _group(self, layer: int, moe: MoeSpec, size: int) -> ExpertGroupConfig:
        return ExpertGroupConfig(self.spec.d_model, moe.expert, size, self._mlp_ranks(f"layers.{layer}.ffn.experts.0"))

    def head(self) -> list[ShardPlan]:
        least = max(MIN_HEAD_PARTS, math.ceil(self.spec.vocab / MAX_HEAD_ROWS))
        sizes = even_parts(self.spec.vocab, least)
        shards, first = [], 0
        for part, rows in enumerate(sizes):
            config = HeadConfig(self.spec.d_model, self.spec.norm, rows, self.spec.head.bias, self._rank("head.weight"))
            path, reason = f"lm_head/part_{part}.mlpackage", f"at most {MAX_HEAD_ROWS} output rows a slice"
            facts = {"part": part, "parts": len(sizes), "rows": (first, first + rows), "reason": reason}
            shards.append(self._shard(path, "lm_head", None, config, **facts))
            first += rows
        return shards

    def _moe(self, layer: int, moe: MoeSpec, experts: int, first: bool) -> MoeConfig:
        soft, prefix = self.options.routing == "soft", f"layers.{layer}.ffn"
        ranks = self._mlp_ranks(f"{prefix}.experts.0")
        shared = (0, 0, 0) if moe.shared is None else self._mlp_ranks(f"{prefix}.shared")
        return MoeConfig(self.spec.d_model, self.spec.norm, moe, experts, first, soft, ranks, shared)

    def _split(self, layer: int, moe: MoeSpec) -> tuple[list[int], str]:
        """Experts per part, and why: the fewest parts within the limit, equal ones where that costs few more."""
        limit, experts = self.options.max_shard_mb * MB, moe.router.experts
        whole = self._shard("", "moe", layer, self._moe(layer, moe, experts, True), experts=tuple(range(experts)))
        if whole.weight_bytes <= limit:
            return [experts], ""
        each = [0] * experts
        for name, size in whole.payloads.items():
            if name.startswith("experts."):
                each[int(name.split(".")[1])] += size
        row = 2 * experts                                               # of the one-hot matrix that picks the gates
        fitting = (limit - (whole.weight_bytes - sum(each))) // (max(each) + row)
        reason = f"{whole.weight_bytes / MB:.0f} MB in one piece, limit {self.options.max_shard_mb} MB"
        if fitting < 1:
            return [1] * experts, f"{reason}; one expert alone is above it"
        return even_parts(experts, math.ceil(experts / fitting)), reason

    def _shard(self, path: str, kind: str, layer: int | None, config: BlockConfig, **facts: Any) -> ShardPlan:
        return self._package(path, kind, layer, {"": config}, _functions(self.options), **facts)

    def _package(
        self,
        path: str,
        kind: str,
        layer: int | None,
        configs: Mapping[str, BlockConfig],
        functions: tuple[tuple[str, int], ...],
        **facts: Any,
    ) -> ShardPlan:
        graphs = {prefix: TemplateKey(config, functions, self.options.layout) for prefix, config in configs.items()}
        plan = ShardPlan(path, kind, layer, graphs, {}, **facts)
        weights = {weight_name(prefix, name): self._source(plan, prefix, name, shape)
                   for prefix, config in configs.items() for name, shape in _weight_shapes(config).items()}  # fmt: skip
        chosen = {name: self.options.recipe.choice(source.name) for name, source in weights.items()
                  if isinstance(source, TensorSource)}  # fmt: skip
        return replace(plan, weights=weights, choices={n: c for n, c in chosen.items() if c != Choice()})

    def _source(self, plan: ShardPlan, prefix: str, name: str, shape: Shape) -> Source:
        """Where the block's parameter `name` comes from."""
        if name == "select.weight":
            return OneHot(shape[0], shape[1], plan.experts[0])
        if found := re.fullmatch(r"(.+)\.recover_(in|out)", name):
            side: Literal["in", "out"] = "in" if found[2] == "in" else "out"
            return Recovery(self._tensor(plan, prefix, f"{found[1]}.weight"), shape[0 if side == "in" else 1], side)
        return self._tensor(plan, prefix, name)

    def _tensor(self, plan: ShardPlan, prefix: str, name: str) -> TensorSource:
        """Our tensor, or the slice of it that the shard holds."""
        source = self.sources[tensor_of(plan.kind, plan.layer, plan.layers, plan.experts, prefix, name, plan.groups)]
        return source.part(*plan.rows) if plan.rows and source.name == "head.weight" else source


def even_parts(total: int, least: int) -> list[int]:
    """Sizes of at least `least` parts: equal ones if a divisor is near (one graph serves all), else nearly equal."""
    for parts in range(least, 2 * least + 1):
        if total % parts == 0:
            return [total // parts] * parts
    size = math.ceil(total / least)
    return [size] * (total // size) + ([total % size] if total % size else [])


@lru_cache
def _weight_shapes(config: BlockConfig) -> dict[str, Shape]:
    return {name: tuple(parameter.shape) for name, parameter in build_unbound(config).named_parameters()}
