"""What a conversion will write, as data: the options, one ShardPlan per package, and all of them
together."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ane_moe.checkpoints.adapter import LowRank
from ane_moe.checkpoints.checkpoint import Hasher, TensorSource
from ane_moe.conversion.early import EarlyRows, ShiftedLogits, rankings
from ane_moe.errors import UserError
from ane_moe.formats.recipe import INT8, Choice, Recipe, find_format
from ane_moe.manifest import (
    Shard,
    length_function,
)
from ane_moe.model.ranking import Ranking
from ane_moe.model.spec import (
    ModelSpec,
    Synchronisations,
)
from ane_moe.model.template_key import TemplateKey
from ane_moe.model.weight import HEAD, WeightName

MB = 1_000_000
BLOB_OVERHEAD = 128  # bytes a stored array takes in the file beside its own: metadata and alignment
MAX_PARTS = 3  # arrays of an encoded weight: indices or data, palettes or mask, scales
DEFAULT_LENGTHS = (32, 128, 512)
ROUTERS, EXPERTS = "router", "experts"
EMBED, GOLDEN_FILES = "embed.bin", "golden*.safetensors"
# Where packages, stores and router tables lie, each directly in its folder: whatever else is in an
# output's folders is not ours.
FOLDERS = (
    *("attn", "routing", "dense", "moe", EXPERTS, "join", "stack", "tracks", "lm_head", "labels"),
    ROUTERS,
)
DISPATCHED = ("sparse", "stream")  # routings whose experts the host calls
MAX_LENGTH = 1 << 12  # a mask of as many rows and columns takes 32 MB


@dataclass(frozen=True)
class ConvertOptions:
    """How to convert. `context` None: 2048 or the model's own if that is less. `prefill` 0: no
    prefill functions. An encoder has functions for `lengths` tokens in their place (None: 32, 128
    and 512, as far as its context goes). `layers` None: all. `max_shard_mb` limits MoE shards; it
    is in MB of 10^6 bytes. For sparse routing there is a function for each group of
    `experts_per_function` experts and each token count in `expert_tokens`; for stream routing
    experts lie in a store, and one function for each token count computes any of them. Up to
    `layers_per_shard` whole layers share a shard
    where they fit into one of `max_shard_mb`. `recipe` says how the matrices are stored;
    `calibrate` is a text file or "builtin", whose passage through the model says which of their
    inputs matter; `budget_mb` (of 10^6 bytes, for all of OUT's weights) or `min_cosine` let it
    choose formats. `groups` gives the experts of each function by layer, where they are not
    neighbours. `ignore_tensors` are patterns (as in a shell) of stored tensors that may be left
    out. Hidden states are divided by `stream_divisor`, a power of two (None: by what a golden or a
    calibration shows a need for); with 1 nothing inside layers is, either. With
    `roster` the host may disturb the choice of experts, for `generate --roster`. Where `inputs` are
    "embeds", the embedding table is left out. With `ring_caches` attention in a window has caches
    no longer than calls can see, as it always has where there are tracks; those of a block are
    apart, or "packed" into one graph. `adapters` are folders of PEFT's: what they add is merged
    into the weights, or each can be switched on by functions of its own. Packages are of `format`:
    Core ML's or Core AI's. By the adapters of a file that `ane-moe align` wrote (`early`),
    attention shards score experts so many layers with experts `ahead`."""

    routing: Literal["masked", "soft", "sparse", "stream"] = "masked"
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
    lengths: tuple[int, ...] | None = None
    stream_divisor: int | None = None
    roster: bool = False
    inputs: Literal["ids", "embeds"] = "ids"
    ring_caches: bool = False
    tracks: Literal["apart", "packed"] = "apart"
    adapters: tuple[str, ...] = ()
    adapter_mode: Literal["merge", "switch"] = "merge"
    format: Literal["mlpackage", "aimodel"] = "mlpackage"
    early: str | None = None
    ahead: int = 1

    @property
    def dispatches(self) -> bool:
        """Whether the host calls the experts that were chosen."""
        return self.routing in DISPATCHED

    @property
    def chooses_formats(self) -> bool:
        """Whether a budget or a least cosine does, and `recipe` is only where it begins."""
        return self.budget_mb is not None or self.min_cosine is not None

    def layers_read(self, golden: bool) -> Sequence[int] | None:
        """The layers whose weights are read (None: all): a golden, a calibration and a choice of
        formats go through those before the last, too."""
        walked = golden or self.calibrate or self.chooses_formats
        return range(max(self.layers) + 1) if self.layers and walked else self.layers


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

    def feed(self, hasher: Hasher) -> None:
        """Feed `hasher` what tells this from others."""
        hasher.update(repr(self).encode())


@dataclass(frozen=True)
class Recovery:
    """One of the two thin matrices kept apart from `source`: its `rank` strongest directions, on
    the way in or out, and after them as many as `more` that an adapter adds (`added`; none: zeros,
    where it adds to other experts). `rows` of a whole tensor are meant, where not all are."""

    source: TensorSource
    rank: int
    side: Literal["in", "out"]
    more: int = field(default=0, repr=False)
    added: LowRank | None = field(default=None, repr=False)
    rows: tuple[int, int] | None = field(default=None, repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.source.shape
        rank = self.rank + self.more
        return (rank, columns) if self.side == "in" else (rows, rank)

    def feed(self, hasher: Hasher) -> None:
        """Feed `hasher` what tells this from other thin matrices."""
        hasher.update(repr(self).encode())
        if self.more:
            hasher.update(repr((self.more, self.rows)).encode())
        if self.added is not None:
            self.added.feed(hasher)


Source = TensorSource | OneHot | Recovery | EarlyRows | ShiftedLogits


def tensors_of(source: Source) -> tuple[TensorSource, ...]:
    """What a source of a weight reads of the checkpoint by itself."""
    if isinstance(source, TensorSource):
        return (source,)
    return source.tensors if isinstance(source, EarlyRows | ShiftedLogits) else ()


@dataclass(frozen=True, kw_only=True)
class ShardPlan(Shard):
    """A package as the manifest will name it, and how to make it: its graphs by prefix (see
    `package.stamp`), where each of its weights comes from and what it takes in the weight file
    (`payloads`, bytes without metadata), and why it was cut as it is. `choices` are of the weights
    that are not stored as plain fp16. `shared` weights (name: another's) are stored with the one
    that is the same tensor of the checkpoint."""

    graphs: Mapping[str, TemplateKey]
    sources: Mapping[str, Source]
    payloads: Mapping[str, int]
    choices: Mapping[str, Choice]
    shared: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""

    @property
    def file_bytes(self) -> int:
        """What the weight file takes at most."""
        arrays = len(self.sources) + MAX_PARTS * len(self.choices)
        return self.weight_bytes + BLOB_OVERHEAD * arrays

    @property
    def matrices(self) -> list[TensorSource]:
        """Those of its weights that a recipe has a say in."""
        tensors = (source for source in self.sources.values() if isinstance(source, TensorSource))
        return [tensor for tensor in tensors if tensor.role]

    def finished(self, content_key: str) -> Shard:
        """What the manifest says of the package."""
        facts = {name: getattr(self, name) for name in Shard.__dataclass_fields__}
        return Shard(**facts | {"content_key": content_key})


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
        return functions_of(self.spec, self.options)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that an encoder's functions take; nothing for a decoder."""
        return lengths_of(self.spec, self.options)

    @property
    def synchronisations(self) -> Synchronisations | None:
        """Of tracks that the host calls."""
        return self.spec.synchronisations if self.options.tracks == "apart" else None

    @property
    def embed_format(self) -> str:
        if self.options.inputs == "embeds":
            return "fp16"
        return self.options.recipe.by_role("embedding").format

    @property
    def embed_bytes(self) -> int:
        if self.options.inputs == "embeds":
            return 0
        return find_format(self.embed_format).stored_bytes(self.spec.vocab, self.spec.d_model)

    @property
    def compressed(self) -> bool:
        """Whether anything is stored otherwise than as fp16."""
        return self.embed_format != "fp16" or any(shard.choices for shard in self.shards)

    @property
    def matrices(self) -> dict[int | None, list[TensorSource]]:
        """The matrices that have a role, whole, by layer (None: the head)."""
        by_name: dict[WeightName, TensorSource] = {}
        for shard in self.shards:
            for source in shard.matrices:
                whole = replace(source, rows=None) if source.name == HEAD else source
                by_name.setdefault(source.name, whole)
        by_layer: dict[int | None, list[TensorSource]] = {}
        for name, source in by_name.items():
            by_layer.setdefault(name.layer, []).append(source)
        return by_layer

    @property
    def largest_weight_bytes(self) -> int:
        """The largest piece a converting process holds at once."""
        sources = (source for shard in self.shards for source in shard.sources.values())
        return max(2 * math.prod(source.shape) for source in sources)

    @property
    def disk_bytes(self) -> int:
        """What the conversion takes on disk, goldens and tokenizer aside."""
        return sum(shard.weight_bytes for shard in self.shards) + self.embed_bytes

    @property
    def halves(self) -> dict[int, tuple[str, ...]]:
        """Of layers that are half of one: the scopes of their shards."""
        alone = (
            n for n in self.layers if None in (self.spec.layers[n].mixer, self.spec.layers[n].ffn)
        )
        own = {n: [shard for shard in self.shards if shard.layer == n] for n in alone}
        scopes = {n: [shard.scope for shard in shards] for n, shards in own.items()}
        return {
            n: tuple(dict.fromkeys(found)) for n, found in scopes.items() if found and all(found)
        }

    @property
    def routers(self) -> dict[int, str]:
        """Paths of the router tables that guesses of the host read, by layer."""
        return {n: f"{ROUTERS}/layer_{n:02d}.bin" for n in self.rankings}

    @property
    def rankings(self) -> dict[int, Ranking]:
        """By layer whose experts the host can guess: what they are ranked by."""
        return rankings(self.spec, self.layers) if self.options.dispatches else {}

    @property
    def early(self) -> dict[int, EarlyRows]:
        """By layer: what its attention shard scores a later layer's experts by."""
        return {
            shard.layer: source
            for shard in self.shards
            for source in shard.sources.values()
            if isinstance(source, EarlyRows) and shard.layer is not None
        }


def sources_of(spec: ModelSpec) -> dict[WeightName, TensorSource]:
    """Sources for the plan of a model whose weights are not at hand: names and shapes, of
    nowhere."""
    return {
        name: TensorSource(name, str(name), row.shape, weight=row) for name, row in spec.weights()
    }


def lengths_of(spec: ModelSpec, options: ConvertOptions) -> tuple[int, ...]:
    lengths, limit = options.lengths, min(spec.context, MAX_LENGTH)
    if not spec.is_encoder:
        if lengths:
            raise UserError(
                f"{spec.family} takes tokens one after the other",
                "lengths are of encoders",
                "leave --lengths out, or give --context",
            )
        return ()
    if lengths is None:
        return tuple(length for length in DEFAULT_LENGTHS if length <= limit) or (limit,)
    if (
        not lengths
        or list(lengths) != sorted(set(lengths))
        or not 1 <= lengths[0] <= lengths[-1] <= limit
    ):
        raise UserError(
            "the lengths are not possible",
            ",".join(map(str, lengths)) or "none",
            f"give rising numbers from 1 to {limit}",
        )
    return lengths


def functions_of(spec: ModelSpec, options: ConvertOptions) -> tuple[tuple[str, int], ...]:
    if spec.is_encoder:
        return tuple((length_function(tokens), tokens) for tokens in lengths_of(spec, options))
    return (("decode", 1), *((("prefill", options.prefill),) if options.prefill else ()))
