"""Decide what a conversion will write, from the ModelSpec and the options alone."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ane_moe.checkpoints.adapter import MERGED_INSTEAD, LowRank
from ane_moe.checkpoints.checkpoint import TensorSource
from ane_moe.conversion.early import EarlyRows, early_rows
from ane_moe.conversion.expert_layout import Formed, common_record
from ane_moe.conversion.extent import CACHE_STEP, blocks_of, extent_of
from ane_moe.conversion.package_plan import Copy, Packing, apart
from ane_moe.conversion.plan import (
    FOLDERS,
    MB,
    ConversionPlan,
    ConvertOptions,
    Recovery,
    ShardPlan,
    functions_of,
)
from ane_moe.early_adapters import Adapters
from ane_moe.errors import UserError
from ane_moe.expert_record import Store
from ane_moe.formats.recipe import Choice
from ane_moe.manifest import EXPERT_GRAPH, FUNCTIONS, TAIL, asset_path
from ane_moe.model.attention import AttentionConfig, RingConfig
from ane_moe.model.experts import ExpertGroupConfig, GivenExpertConfig, SharedExpertConfig
from ane_moe.model.head import HeadConfig
from ane_moe.model.join import JoinConfig
from ane_moe.model.latent import LatentRanks
from ane_moe.model.mixer import MixerConfig
from ane_moe.model.mixers import mixer_config
from ane_moe.model.mlp import DenseConfig, MlpRanks
from ane_moe.model.moe import MoeConfig
from ane_moe.model.part import PartConfig
from ane_moe.model.port import ADDED, FFN_INPUT, LATER, STREAM, How, track_slot
from ane_moe.model.routed import EarlyConfig, RoutedMixerConfig, RoutingConfig
from ane_moe.model.spec import (
    GqaSpec,
    LatentSpec,
    LayerSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    SharedGqaSpec,
    SharedSpec,
    TrackSpec,
)
from ane_moe.model.stack import FfnConfig, PackedConfig, StackConfig, can_share
from ane_moe.model.template_key import weight_name
from ane_moe.model.weight import HEAD, WeightName
from ane_moe.wording import counted, listed

MAX_WEIGHT_BYTES = 1 << 31  # Core ML refuses larger weight files (coremltools PR 2593)
MAX_HEAD_ROWS = 16_384  # widest axis of the M1 to M3 engines (ane-guide, appendix A)
MIN_HEAD_PARTS = 2


def make_plan(
    spec: ModelSpec,
    sources: Mapping[WeightName, TensorSource],
    options: ConvertOptions,
    adapters: Mapping[str, Mapping[WeightName, LowRank]] | None = None,
    early: Adapters | None = None,
) -> ConversionPlan:
    """Cut the model into shards. What `adapters` add, by their names, gets functions of its own;
    by those that are `early` attention shards guess experts.

    Raises UserError for a context or a layer the model does not have, for senseless expert
    functions, for a shard that cannot be cut below 2 GiB, and as `early_rows` does.
    """
    extent = extent_of(spec, options)
    spec, layers = extent.spec, extent.layers
    rows = {} if early is None else early_rows(spec, sources, early, options.ahead, layers)
    planner = _Planner(spec, sources, options, extent.slots, adapters or {}, early=rows)
    if spec.tracks is None:
        shards = [shard for group in planner.groups(layers) for shard in planner.layers(group)]
    else:
        blocks = blocks_of(spec.tracks, len(spec.layers), layers, options)
        shards = [shard for block in blocks for shard in planner.block(block, spec.tracks)]
    if len(layers) == len(spec.layers):
        shards += planner.head()
    shards += planner.expert_graphs()
    if options.format == "aimodel":
        shards = list(map(_as_asset, shards))
    for shard in shards:
        assert shard.path.split("/")[0] in FOLDERS, shard.path  # else none would sweep it
        if shard.store is None and shard.file_bytes > MAX_WEIGHT_BYTES:
            raise UserError(
                f"{shard.path} would hold {shard.weight_bytes / MB:.0f} MB",
                "Core ML's limit is 2 GiB a package",
            )
    for name, low_ranks in (adapters or {}).items():
        _require_switched(name, low_ranks, layers, shards)
    return ConversionPlan(spec, options, extent.context, extent.slots, layers, tuple(shards))


def _require_switched(
    name: str, low_ranks: Mapping[WeightName, LowRank], layers: Sequence[int], shards: Sequence[Any]
) -> None:
    """Raise UserError where a matrix is adapted that is no projection of ours."""
    thin = (one for shard in shards for one in shard.sources.values() if isinstance(one, Recovery))
    used = {one.source.name for one in thin if one.added is not None}
    head = any(shard.scope == HEAD.part for shard in shards)
    idle = [
        one
        for one in low_ranks.keys() - used
        if (head if one.layer is None else one.layer in layers)
    ]
    if not idle:
        return
    stored = any(shard.store for shard in shards) and all(one.expert is not None for one in idle)
    why = "it adapts experts, which lie in a store" if stored else "it adapts more than projections"
    what = f"the adapter {name} cannot be switched: {why}"
    raise UserError(what, listed([str(one) for one in idle]), MERGED_INSTEAD)


@dataclass(frozen=True)
class _Planner:
    spec: ModelSpec
    sources: Mapping[WeightName, TensorSource]
    options: ConvertOptions
    slots: int
    adapters: Mapping[str, Mapping[WeightName, LowRank]] = field(default_factory=dict)
    low_ranks: Mapping[WeightName, LowRank] = field(default_factory=dict)
    early: Mapping[int, EarlyRows] = field(default_factory=dict)
    # Paths of the packages that compute stored experts, by what these are.
    graphs: dict[GivenExpertConfig, str] = field(default_factory=dict)

    @cached_property
    def _with_adapter(self) -> dict[str, "_Planner"]:
        """Who plans the same model with what an adapter adds."""
        return {
            name: replace(self, adapters={}, low_ranks=low_ranks)
            for name, low_ranks in self.adapters.items()
        }

    @cached_property
    def _packing(self) -> Packing:
        recipe, layout = self.options.recipe, self.options.layout
        return Packing(self.sources, recipe, layout, self.adapters, self.early)

    @cached_property
    def _more(self) -> dict[tuple[int | None, str, str], int]:
        """Directions that the adapter adds to a matrix; of experts, to any of them."""
        most: dict[tuple[int | None, str, str], int] = {}
        for name, low_rank in self.low_ranks.items():
            place = (name.layer, name.part, _of_any(name))
            most[place] = max(low_rank.rank, most.get(place, 0))
        return most

    def _copy(
        self, make: Callable[["_Planner"], PartConfig], experts: tuple[int, ...] = ()
    ) -> Copy:
        """What `make` makes of this planner, and of those of adapters that change it."""
        block = make(self)
        others = {name: make(planner) for name, planner in self._with_adapter.items()}
        changed = {name: other for name, other in others.items() if other != block}
        return Copy(block, experts, changed)

    def groups(self, layers: Sequence[int]) -> list[tuple[int, ...]]:
        """Layers that share a shard: those that read one layer's caches with it, else neighbours
        with one window and one RoPE; as many as asked for and as fit."""
        lending = [group for group in self._lending(layers) if self._can_stack(group)]
        together = {layer for group in lending for layer in group}
        groups: list[tuple[int, ...]] = []
        for layer in layers:
            if layer in together:
                continue
            longer = (*groups[-1], layer) if groups else (layer,)
            if len(longer) > 1 and not self._lends(longer) and self._can_stack(longer):
                groups[-1] = longer
            else:
                groups.append((layer,))
        return sorted([*groups, *lending])

    def _lending(self, layers: Sequence[int]) -> list[tuple[int, ...]]:
        """Each layer whose caches others read, and these."""
        own = {n: self.spec.source(n) for n in layers}
        return [tuple(n for n in layers if own[n] == lender) for lender in self.spec.lenders]

    def _lends(self, group: Sequence[int]) -> bool:
        """Whether layers read the caches of one among them."""
        return any(self.spec.source(n) != n and self.spec.source(n) in group for n in group)

    def block(self, block: tuple[range, ...], tracks: TrackSpec) -> list[ShardPlan]:
        """The shards of a block, track by track, or one. Each track goes on in a slot of its own;
        what its last layers give, it gives to the stream."""
        number = block[0].start // (tracks.count * tracks.depth)
        if self.options.tracks == "packed":
            return [self._packed(block, tracks, f"tracks/block_{number:02d}.mlpackage")]
        return [
            shard
            for track, layers in enumerate(block)
            for shard in _on_track(
                self._track(layers, f"tracks/block_{number:02d}_track_{track}"), track, tracks
            )
        ]

    def _packed(self, block: tuple[range, ...], tracks: TrackSpec, path: str) -> ShardPlan:
        group = tuple(number for layers in block for number in layers)
        reason = f"{tracks.count} tracks of {len(block[0])} layers in one graph"

        def packed(planner: "_Planner") -> PackedConfig:
            layers = planner._stack(group).layers
            return PackedConfig(layers, tracks=tracks.count, reduce=tracks.reduce)

        copy = self._copy(packed, self._experts(group))
        facts: dict[str, Any] = {"layers": group, "reason": reason}
        facts |= {"tracks": tracks.count, "reduce": tracks.reduce}
        return self._shard(path, "track", group[0], copy, **facts)

    def _track(self, layers: range, name: str) -> list[ShardPlan]:
        """As few shards for the layers of a track as the size limit allows; one of them alone has
        this name."""
        shards: list[ShardPlan] = []
        rest = tuple(layers)
        while rest:
            whole = self._undispatched(rest)
            fitting = (n for n in range(whole, 0, -1) if self._fits(rest[:n]))
            count = next(fitting, 0)
            shards += [self.stack(rest[:count])] if count else self.layers(rest[:1])
            rest = rest[count or 1 :]
        if len(shards) > 1:
            return shards
        return [replace(shards[0], path=f"{name}.mlpackage", kind="track")]

    def _fits(self, group: tuple[int, ...]) -> bool:
        return self.stack(group).weight_bytes <= self.options.max_shard_mb * MB

    def layers(self, group: tuple[int, ...]) -> list[ShardPlan]:
        """The shards of one layer, or the one of several."""
        return (
            [self.stack(group)]
            if len(group) > 1
            else [*self.attention(group[0]), *self.ffn(group[0])]
        )

    def stack(self, group: Sequence[int]) -> ShardPlan:
        tracks = self.spec.tracks
        most = tracks.depth if tracks else self.options.layers_per_shard
        reason = f"{len(group)} layers, limits {most} and {self.options.max_shard_mb} MB"
        path = f"stack/layer_{group[0]:02d}_to_{group[-1]:02d}.mlpackage"
        copy = self._copy(lambda planner: planner._stack(group), self._experts(group))
        return self._shard(path, "stack", group[0], copy, reason=reason, layers=tuple(group))

    def _experts(self, group: Sequence[int]) -> tuple[int, ...]:
        ffns = (self.spec.layers[n].ffn for n in group)
        return tuple(
            range(max(ffn.router.experts if isinstance(ffn, MoeSpec) else 0 for ffn in ffns))
        )

    def _can_stack(self, group: tuple[int, ...]) -> bool:
        neighbours = tuple(group) == tuple(range(group[0], group[-1] + 1))
        if not 1 < len(group) <= self.options.layers_per_shard or not neighbours:
            return False
        if self._undispatched(group) < len(group):
            return False
        if any(self.spec.layers[n].hands_on or self.spec.layers[n].takes for n in group):
            return False
        if not can_share(self._stack(group).layers):
            return False
        return self._fits(group)

    def _undispatched(self, group: Sequence[int]) -> int:
        """How many layers come before one whose experts the host dispatches, between its mixer and
        the next layer."""
        called = self.options.dispatches
        kept = (called and isinstance(self.spec.layers[n].ffn, MoeSpec) for n in group)
        return next((place for place, dispatched in enumerate(kept) if dispatched), len(group))

    def _stack(self, group: Sequence[int]) -> StackConfig:
        lends = self._lends(group)
        layers = tuple((self._mixer(n, lends), self._whole_ffn(n)) for n in group)
        runs: tuple[tuple[str, int, int], ...] = ()
        if lends and self.options.prefill and group[1] >= self._tail:
            runs = (("prefill", 0, 1), (TAIL, 1, len(group)))
        return StackConfig(layers, lends, runs)

    def _whole_ffn(self, layer: int) -> FfnConfig | None:
        ffn = self.spec.layers[layer].ffn
        if isinstance(ffn, MoeSpec):
            return self._moe(layer, ffn, ffn.router.experts, True)
        return None if ffn is None else self._dense(layer, ffn)

    def _dense(self, layer: int, mlp: MlpSpec) -> DenseConfig:
        spec = self.spec.layers[layer]
        return DenseConfig(
            self.spec.d_model,
            self.spec.norm.ungated,
            mlp,
            self._mlp_ranks(layer, "mlp."),
            spec.ffn_residual,
        )

    def _mlp_ranks(self, layer: int, prefix: str = "", expert: int | None = None) -> MlpRanks:
        paths = (f"{prefix}{matrix}.weight" for matrix in ("gate", "up", "down"))
        gate, up, down = self._ranks(layer, paths, expert)
        return gate, up, down

    def _ranks(self, layer: int, paths: Iterable[str], expert: int | None = None) -> Iterator[int]:
        """Directions beside matrices of a feed-forward block: 0 of those that it has not."""
        names = (WeightName(layer, "ffn", expert, path) for path in paths)
        return (self._rank(name) if name in self.sources else 0 for name in names)

    def _rank(self, name: WeightName) -> int:
        """Directions beside a tensor: kept apart from it, or added by an adapter."""
        return apart(self.sources[name], self.options.recipe) + self._more.get(
            (name.layer, name.part, _of_any(name)), 0
        )

    def _mixer(self, layer: int, lends: bool = False) -> MixerConfig | None:
        """That of a layer; `lends`: in a package with those that read its caches."""
        spec, d_model = self.spec.layers[layer], self.spec.d_model
        mixer = spec.mixer
        if mixer is None:
            return None
        projections = (row.path.removesuffix(".weight") for row in mixer.rows(d_model) if row.role)
        ranks = {
            path: self._rank(WeightName(layer, "attn", None, f"{path}.weight"))
            for path in projections
        }
        slots, config = self.slots, mixer_config(mixer)
        if isinstance(mixer, GqaSpec) and config is AttentionConfig:
            slots = min(slots, self._ring(mixer))
            config = RingConfig if slots < self.slots else config
        return config(
            d_model,
            self.spec.norm,
            mixer,
            rotary=len(self.spec.ropes[mixer.rope].inv_freq) if mixer.rope else 0,
            slots=slots,
            # Core ML's states are of one package, and these may be read in others.
            explicit=self.options.state == "explicit" or (layer in self.spec.lenders and not lends),
            ranks=tuple((path, rank) for path, rank in ranks.items() if rank),
            residual=spec.mixer_residual,
            entry=spec.entry,
        )

    def _ring(self, mixer: GqaSpec) -> int:
        """Slots that a cache takes where the last tokens alone are kept: the window of the first
        token of a call, and the call's other tokens."""
        asked = self.options.ring_caches or self.spec.tracks
        if not asked or mixer.window is None or mixer.sees_prompt:
            return self.slots
        others = max(tokens for _, tokens in functions_of(self.spec, self.options)) - 1
        return math.ceil((mixer.window + others) / CACHE_STEP) * CACHE_STEP

    def attention(self, layer: int) -> list[ShardPlan]:
        """The mixer, and routing with it where the host dispatches experts."""
        spec = self.spec.layers[layer]
        dispatched = self.options.dispatches and isinstance(spec.ffn, MoeSpec)
        if spec.mixer is None and not dispatched:
            return []
        kind = "routing" if spec.mixer is None else "attn"
        path = f"{kind}/layer_{layer:02d}.mlpackage"
        copy = self._copy(lambda planner: planner._routed(layer))
        far = counted(self.options.ahead, "layer")
        reason = f"scores experts {far} ahead" if layer in self.early else ""
        return [self._shard(path, kind, layer, copy, scope="attn", reason=reason)]

    def _routed(self, layer: int) -> PartConfig:
        spec, mixer = self.spec.layers[layer], self._mixer(layer)
        ffn = spec.ffn
        if not isinstance(ffn, MoeSpec) or not self.options.dispatches:
            assert mixer is not None
            return mixer
        rows = self.early.get(layer)
        early = EarlyConfig(rows.shape[0], rows.ranking) if rows else None
        if mixer is None:
            ranks = self._latent_ranks(layer)
            return RoutingConfig(
                self.spec.d_model, self.spec.norm, ffn.router, early, ffn.latent, ranks
            )
        assert ffn.latent is None  # no family has it beside a mixer
        # Experts add to the stream with what a mixer beside them adds.
        whole = replace(mixer, residual=replace(mixer.residual, parallel=False))
        return RoutedMixerConfig(whole, ffn.router, spec.ffn_residual, ffn.router_norm, early)

    def ffn(self, layer: int) -> list[ShardPlan]:
        ffn = self.spec.layers[layer].ffn
        if ffn is None:
            return []
        if isinstance(ffn, MlpSpec):
            path = f"dense/layer_{layer:02d}.mlpackage"
            copy = self._copy(lambda planner: planner._dense(layer, ffn))
            return [self._shard(path, "dense", layer, copy, scope="ffn")]
        if self.options.dispatches:
            stored = self.options.routing == "stream"
            shards = self.stored_experts(layer, ffn) if stored else self.experts(layer, ffn)
            return self.joined(layer, shards)
        sizes, reason = self._split(layer, ffn)
        shards, first = [], 0
        for part, size in enumerate(sizes):
            suffix = f"_part_{part + 1}" if len(sizes) > 1 else ""
            path = f"moe/layer_{layer:02d}{suffix}.mlpackage"
            copy = self._part(layer, ffn, range(first, first + size))
            facts = {"scope": "ffn", "part": part, "parts": len(sizes), "reason": reason}
            shards.append(self._shard(path, "moe", layer, copy, **facts))
            first += size
        return self.joined(layer, shards) if len(shards) > 1 else shards

    def experts(self, layer: int, moe: MoeSpec) -> list[ShardPlan]:
        """Packages of a layer's expert functions: as few as the size limit of a weight file
        allows."""
        groups = self._expert_groups(layer, moe.router.experts)
        shared = self._shared_copy(layer, moe)

        def package(path: str, copies: dict[str, Copy], **facts: Any) -> ShardPlan:
            return self._expert_package(path, layer, copies, **facts)

        def routed(group: tuple[int, ...]) -> dict[str, Copy]:
            copy = self._copy(lambda planner: planner._group(layer, moe, len(group)), group)
            return {f"expert_{group[0]:03d}": copy}

        largest = max(package("", routed(group)).file_bytes for group in groups)
        room = MAX_WEIGHT_BYTES - package("", shared).file_bytes
        parts = even_parts(len(groups), math.ceil(len(groups) / max(1, room // largest)))
        shards, first = [], 0
        for part, count in enumerate(parts):
            copies: dict[str, Copy] = {}
            for group in groups[first : first + count]:
                copies |= routed(group)
            copies |= {} if part else shared
            suffix = f"_part_{part + 1}" if len(parts) > 1 else ""
            reason = "weight files end at 2 GiB" if suffix else ""
            path = f"experts/layer_{layer:02d}{suffix}.mlpackage"
            shards.append(package(path, copies, part=part, parts=len(parts), reason=reason))
            first += count
        return shards

    def stored_experts(self, layer: int, moe: MoeSpec) -> list[ShardPlan]:
        """The store of a layer's experts, and a package of the one that is always called."""
        config, count = self._group(layer, moe, 1), moe.router.experts
        copies = {f"expert_{expert:03d}": Copy(config, (expert,)) for expert in range(count)}
        shared = self._shared_copy(layer, moe)
        path, parts = f"experts/layer_{layer:02d}", 2 if shared else 1
        reason = f"{count} records, read when they are chosen"
        shard = self._expert_package(f"{path}.bin", layer, copies, parts=parts, reason=reason)
        record = common_record((_formed(shard, prefix, config) for prefix in copies), layer)
        store = Store(self._graph(config), count, record)
        shards = [replace(shard, graphs={}, store=store, weight_bytes=count * record.size)]
        if shared:
            facts = {"part": 1, "parts": parts}
            shards.append(self._expert_package(f"{path}.mlpackage", layer, shared, **facts))
        return shards

    def _graph(self, config: ExpertGroupConfig) -> str:
        """The path of the package that computes experts that are alike."""
        return self.graphs.setdefault(
            GivenExpertConfig(config), f"experts/graph_{len(self.graphs):02d}.mlpackage"
        )

    def expert_graphs(self) -> list[ShardPlan]:
        """The packages that compute stored experts, whatever their layer."""
        return [
            self._packing.package(
                path, EXPERT_GRAPH, None, {"": Copy(config)}, self._expert_functions
            )
            for config, path in self.graphs.items()
        ]

    @property
    def _expert_functions(self) -> tuple[tuple[str, int], ...]:
        return tuple((f"t{tokens}", tokens) for tokens in self.options.expert_tokens)

    def _expert_package(
        self, path: str, layer: int, copies: Mapping[str, Copy], **facts: Any
    ) -> ShardPlan:
        functions = self._expert_functions
        return self._packing.package(
            path, "experts", layer, copies, functions, scope="ffn", **facts
        )

    def _shared_copy(self, layer: int, moe: MoeSpec) -> dict[str, Copy]:
        """The expert that is always called, where there is one that adds to what others do."""
        if moe.shared is None or moe.latent is not None:
            return {}
        own = moe.shared
        return {"shared": self._copy(lambda planner: planner._shared(layer, own))}

    def _expert_groups(self, layer: int, total: int) -> list[tuple[int, ...]]:
        """Experts of each function, in the order of their first ones."""
        size, given = self.options.experts_per_function, self.options.groups
        if not given:
            return [
                tuple(range(first, min(first + size, total))) for first in range(0, total, size)
            ]
        groups = sorted(given.get(layer, ()))
        if sorted(expert for group in groups for expert in group) != list(range(total)) or any(
            group != tuple(sorted(group)) or not 0 < len(group) <= size for group in groups
        ):
            raise UserError(
                f"the grouping does not fit layer {layer}",
                f"{len(groups)} groups for {total} experts",
                "make it from a trace of this model",
            )
        return groups

    def _shared(self, layer: int, shared: SharedSpec) -> SharedExpertConfig:
        ranks = self._shared_ranks(layer)
        return SharedExpertConfig(self.spec.d_model, shared, ranks, self._target(layer))

    def _group(self, layer: int, moe: MoeSpec, size: int) -> ExpertGroupConfig:
        ranks, affine = self._mlp_ranks(layer, expert=0), self.spec.layers[layer].affine
        slot = self._target(layer)
        width = moe.width(self.spec.d_model)
        return ExpertGroupConfig(width, moe.expert, size, ranks, affine, slot)

    def _target(self, layer: int) -> str:
        """The slot that a layer's experts add to."""
        whole = self.spec.layers[layer]
        residual, in_latent = whole.ffn_residual, _latent(whole) is not None
        apart = residual.norms != "before" or in_latent
        return ADDED if apart else LATER if residual.hands_on else STREAM

    def joined(self, layer: int, shards: Sequence[ShardPlan]) -> list[ShardPlan]:
        """Shards of a layer's experts and, if their sum is normed or in a latent, what takes it to
        the stream: the last part."""
        if self._target(layer) != ADDED:
            return [*shards]
        copy = self._copy(lambda planner: planner._join(layer))
        path, parts = f"join/layer_{layer:02d}.mlpackage", len(shards) + 1
        latent = _latent(self.spec.layers[layer])
        done = f"taken out of {latent.width} channels" if latent else "normed"
        reason = f"the sum of the experts is {done}"
        join = self._shard(path, "join", layer, copy, scope="ffn", part=len(shards), reason=reason)
        return [replace(shard, parts=parts) for shard in (*shards, join)]

    def _join(self, layer: int) -> JoinConfig:
        spec = self.spec.layers[layer]
        moe = spec.ffn
        assert isinstance(moe, MoeSpec)
        return JoinConfig(
            self.spec.d_model,
            self.spec.norm,
            spec.ffn_residual,
            moe.beside,
            self._beside_ranks(layer),
            moe.latent,
            moe.shared if moe.latent else None,  # elsewhere it adds to what experts do
            self._latent_ranks(layer),
            self._shared_ranks(layer),
        )

    def head(self) -> list[ShardPlan]:
        head, scores, kind, least = self.spec.head, self.spec.scores, "labels", 1
        if not head.labels:
            kind, least = "lm_head", max(MIN_HEAD_PARTS, math.ceil(scores / MAX_HEAD_ROWS))
        sizes = even_parts(scores, least)
        shards, first = [], 0
        for part, rows in enumerate(sizes):
            copy = self._copy(lambda planner, rows=rows: planner._head_config(rows))  # type: ignore[misc]
            path = f"{kind}/part_{part}.mlpackage"
            reason = f"at most {MAX_HEAD_ROWS} output rows a slice" if len(sizes) > 1 else ""
            facts = {
                "part": part,
                "parts": len(sizes),
                "rows": (first, first + rows),
                "reason": reason,
            }
            shards.append(self._shard(path, kind, None, copy, scope=HEAD.part, **facts))
            first += rows
        return shards

    def _head_config(self, rows: int) -> HeadConfig:
        head = self.spec.head
        rank = 0 if head.labels else self._rank(HEAD)
        norm = head.norm(self.spec.norm)
        return HeadConfig(self.spec.d_model, norm, rows, rank, head.bias, head.softcap)

    def _part(self, layer: int, moe: MoeSpec, experts: range) -> Copy:
        """A part of a MoE layer that holds these experts."""
        first = experts.start == 0
        return self._copy(
            lambda planner: planner._moe(layer, moe, len(experts), first), tuple(experts)
        )

    def _moe(self, layer: int, moe: MoeSpec, experts: int, first: bool) -> MoeConfig:
        soft, ranks = self.options.routing == "soft", self._mlp_ranks(layer, expert=0)
        whole = self.spec.layers[layer]
        return MoeConfig(
            self.spec.d_model,
            self.spec.norm,
            moe,
            experts,
            first,
            soft,
            ranks,
            self._shared_ranks(layer),
            whole.ffn_residual,
            self._beside_ranks(layer),
            self._latent_ranks(layer),
        )

    def _shared_ranks(self, layer: int) -> MlpRanks:
        return self._mlp_ranks(layer, "shared.")

    def _beside_ranks(self, layer: int) -> MlpRanks:
        return self._mlp_ranks(layer, "beside.mlp.")

    def _latent_ranks(self, layer: int) -> LatentRanks:
        entering, leaving = self._ranks(layer, ("latent_in.weight", "latent_out.weight"))
        return entering, leaving

    def _split(self, layer: int, moe: MoeSpec) -> tuple[list[int], str]:
        """Experts per part, and why: the fewest parts within the limit, equal ones where that costs
        few more."""
        limit, experts = self.options.max_shard_mb * MB, moe.router.experts
        copy = self._part(layer, moe, range(experts))
        whole = self._shard("", "moe", layer, copy, scope="ffn")
        if whole.weight_bytes <= limit:
            return [experts], ""
        each = [0] * experts
        for parameter, size in whole.payloads.items():
            expert = whole.place(copy.experts).name(parameter).expert
            if expert is not None:
                each[expert] += size
        row = 2 * moe.router.classes  # of the one-hot matrix that picks the gates
        fitting = (limit - (whole.weight_bytes - sum(each))) // (max(each) + row)
        reason = (
            f"{whole.weight_bytes / MB:.0f} MB in one piece, limit {self.options.max_shard_mb} MB"
        )
        if fitting < 1:
            return [1] * experts, f"{reason}; one expert alone is above it"
        return even_parts(experts, math.ceil(experts / fitting)), reason

    def _shard(
        self, path: str, kind: str, layer: int | None, copy: Copy, **facts: Any
    ) -> ShardPlan:
        functions = functions_of(self.spec, self.options)
        if layer is not None and layer >= self._tail:
            functions = ((TAIL, 1),)
        elif isinstance(copy.block, StackConfig) and copy.block.runs:
            functions = (*functions, (TAIL, 1))
        return self._packing.package(path, kind, layer, {"": copy}, functions, **facts)

    @cached_property
    def _tail(self) -> int:
        """The first of the last layers that keep nothing, and choose no experts: who records
        choices wants them of all tokens."""
        first = len(self.spec.layers)
        while first and _keeps_nothing(self.spec.layers[first - 1]):
            first -= 1
        return first


def _as_asset(shard: ShardPlan) -> ShardPlan:
    """The same shard as one of Core AI's assets, on disk in the same place."""
    store = shard.store and replace(shard.store, graph=asset_path(shard.store.graph))
    return replace(shard, path=asset_path(shard.path), store=store)


def _formed(shard: ShardPlan, prefix: str, config: PartConfig) -> tuple[Formed, ...]:
    """The weights of one expert, and their formats."""
    names = {row.path: weight_name(prefix, row.path) for row in config.rows()}
    return tuple(
        (path, shard.sources[name].shape, shard.choices.get(name, Choice()).format)
        for path, name in names.items()
    )


def _of_any(name: WeightName) -> str:
    """The path of a tensor, told apart from others but not by expert."""
    return name.path if name.expert is None else f"experts.{name.path}"


def _latent(layer: LayerSpec) -> LatentSpec | None:
    return layer.ffn.latent if isinstance(layer.ffn, MoeSpec) else None


def _keeps_nothing(layer: LayerSpec) -> bool:
    return isinstance(layer.mixer, SharedGqaSpec) and isinstance(layer.ffn, MlpSpec)


def _on_track(shards: Sequence[ShardPlan], track: int, tracks: TrackSpec) -> list[ShardPlan]:
    """The shards of a track's part of a block: they begin with the stream, hand on a slot of the
    track's own, and end with the meeting, which the first of the tracks begins."""
    meets: How = tracks.reduce if track else "set"
    own, moved = track_slot(STREAM, track), []
    normed = track_slot(FFN_INPUT, track)
    setters = [place for place, shard in enumerate(shards) if _sets_stream(shard)]
    for place, shard in enumerate(shards):
        begins = sum(setter <= place for setter in setters) == 1
        ends = place >= setters[-1]
        ports = (STREAM if begins else own, STREAM if ends else own, meets if ends else "set")
        both: dict[str, Any] = {
            name: tuple(
                replace(entry, ports=entry.ports.through(*ports).renamed(FFN_INPUT, normed))
                for entry in getattr(shard, name)
            )
            for name in FUNCTIONS
        }
        moved.append(replace(shard, **both))
    return moved


def _sets_stream(shard: ShardPlan) -> bool:
    outputs = shard.functions[0].ports.outputs
    return any(port.slot == STREAM and port.how == "set" for port in outputs)


def even_parts(total: int, least: int) -> list[int]:
    """Sizes of at least `least` parts: equal ones if a divisor is near (one graph serves all), else
    nearly equal."""
    for parts in range(least, 2 * least + 1):
        if total % parts == 0:
            return [total // parts] * parts
    size = math.ceil(total / least)
    return [size] * (total // size) + ([total % size] if total % size else [])
