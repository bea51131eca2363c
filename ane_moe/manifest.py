"""runtime_meta.json: everything a runtime needs to know of a conversion, and nothing it has to
guess.

Written last, so its presence means the conversion is complete. All paths are relative to its own
folder.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from ane_moe.errors import UserError
from ane_moe.expert_record import Store, store_of
from ane_moe.files import write_text
from ane_moe.manifest_facts import require_sound
from ane_moe.model.port import FFN_INPUT, STATE, Port, Ports, slot_rows
from ane_moe.model.spec import Synchronisations
from ane_moe.model.template_key import function_name
from ane_moe.model.weight import Place
from ane_moe.package_form import ASSET, PACKAGE

FILE_NAME = "runtime_meta.json"
FORMAT = 3
MAX_BYTES = 1 << 28
FUNCTIONS = ("functions", "adapted")  # fields of a shard
EXPERT_GRAPH = "expert_graph"  # the kind of what computes stored experts
TAIL = "tail"  # a function for one token, of a prompt the last one, in each lane


def asset_path(path: str) -> str:
    """The path of a package as one of Core AI's assets; what is no package stays where it is."""
    return f"{path.removesuffix(PACKAGE)}{ASSET}" if path.endswith(PACKAGE) else path


def length_function(tokens: int) -> str:
    """What an encoder's functions for so many tokens are called."""
    return f"length_{tokens}"


@dataclass(frozen=True)
class ShardFunction:
    """One entry point: `tokens` is T, the number of tokens in a call, and `experts` those it
    computes (in each layer). `ports` are its inputs, outputs and states, each with the slot of the
    host that it reads or writes.

    A call works through `weight_bytes` of stored weights, `elements` of them, at the chip's rate
    for the format that most of them have (`rate`: fp16, int8 or lut). With the `adapter` it stands
    in the place of the function of the same name without. It goes through these of the package's
    `layers`; none: all.
    """

    name: str
    tokens: int
    ports: Ports
    experts: tuple[int, ...] = ()
    elements: int = 0
    weight_bytes: int = 0
    rate: str = "fp16"
    adapter: str = ""
    layers: tuple[int, ...] = ()

    @property
    def entry(self) -> str:
        """What the package calls it."""
        return function_name(self.adapter, self.name)

    @property
    def dispatched(self) -> bool:
        """Whether the host calls it for the tokens that chose its experts."""
        return any(port.root == FFN_INPUT for port in self.ports.inputs)


@dataclass(frozen=True)
class Shard:
    """One `.mlpackage` or `.aimodel`, or a `store` of experts that the graph of another one
    computes. kind: attn, routing, moe, dense, experts, expert_graph, stack, lm_head. `layer` is
    None for lm_head and expert_graph.

    A stack holds consecutive whole `layers`, the first of them `layer`. `scope` is the part of the
    model whose weights it holds, where their own names do not say.

    Where the tracks of a block stand side by side in it, there are so many `tracks`, which meet by
    `reduce`.

    `part`/`parts` number the pieces of a split layer (their outputs are added) or the vocabulary
    slices of the head (their outputs are concatenated). `kind` is a label for reports; what is done
    with a shard follows from the slots of its functions. Those `adapted` work on the same weights,
    each with what an adapter adds.
    """

    path: str
    kind: str
    layer: int | None
    functions: tuple[ShardFunction, ...]
    scope: str = ""
    part: int = 0
    parts: int = 1
    layers: tuple[int, ...] = ()
    weight_bytes: int = 0
    content_key: str = ""
    tracks: int = 1
    reduce: str = ""
    adapted: tuple[ShardFunction, ...] = ()
    store: Store | None = None

    def with_adapter(self, name: str) -> "Shard":
        """With the functions of an adapter in the place of those that it changes."""
        own = {entry.name: entry for entry in self.adapted if entry.adapter == name}
        functions = tuple(own.get(entry.name, entry) for entry in self.functions)
        return replace(self, functions=functions, adapted=())

    @property
    def experts(self) -> tuple[int, ...]:
        """The experts that its functions hold."""
        return tuple(sorted({expert for function in self.functions for expert in function.experts}))

    @property
    def states(self) -> dict[str, tuple[int, ...]]:
        """What is kept from call to call, inside the package or by the host: shapes by slot."""
        ports = self.functions[0].ports
        written = {port.slot for port in ports.outputs}
        kept = (*ports.states, *(port for port in ports.inputs if port.slot in written))
        return {port.slot: port.shape for port in kept if port.root == STATE}

    @property
    def borrowed(self) -> dict[str, tuple[int, ...]]:
        """What it reads of what another shard keeps: shapes by slot."""
        inputs, own = self.functions[0].ports.inputs, self.states
        read = (port for port in inputs if port.root == STATE and port.slot not in own)
        return {port.slot: port.shape for port in read}

    @property
    def has_tail(self) -> bool:
        """Whether of a prompt the last token alone needs it, or its last layers: nothing after
        that keeps anything."""
        return any(function.name == TAIL for function in self.functions)

    @property
    def is_tail(self) -> bool:
        """Whether the last token alone needs all of it."""
        return all(function.name == TAIL for function in self.functions)

    def run_of(self, function: ShardFunction) -> "Shard":
        """As if it held no more layers than this function goes through."""
        if not function.layers:
            return self
        return replace(self, layer=function.layers[0], layers=function.layers)

    @property
    def rows(self) -> tuple[int, int] | None:
        """The (first, last + 1) row of the vocabulary it gives scores for; None for other
        shards."""
        scores = [port.slot for port in self.functions[0].ports.outputs if port.root == "logits"]
        return slot_rows(scores[0]) if scores else None

    @property
    def dispatched(self) -> bool:
        """Whether the host calls its functions for the tokens that chose their experts."""
        return self.functions[0].dispatched

    @property
    def copies(self) -> dict[tuple[int, ...], tuple[ShardFunction, ...]]:
        """Functions by the experts they compute: those of one entry differ in their token counts,
        and share weights."""
        by_experts: dict[tuple[int, ...], list[ShardFunction]] = {}
        for function in self.functions:
            by_experts.setdefault(function.experts, []).append(function)
        return {experts: tuple(functions) for experts, functions in by_experts.items()}

    def place(self, experts: tuple[int, ...]) -> Place:
        """Where the weights of the functions for `experts` stand in the model."""
        alone = () if self.layer is None else (self.layer,)
        return Place(self.layers or alone, self.scope, experts)


@dataclass(frozen=True)
class Manifest:
    """The whole conversion. `ropes` gives each rotary table as inv_freq and attention_factor (see
    RopeSpec)."""

    family: str
    d_model: int
    vocab: int
    layers: tuple[int, ...]  # indices of the converted layers, in order
    n_layers: int  # layers of the whole model
    context: int  # tokens the KV cache holds
    cache_width: int  # last axis of the KV states: context rounded up to a multiple of 32
    routing: str  # masked | soft | sparse | stream
    state: str  # mlstate | explicit
    layout: str  # bc1s | bct1
    prefill: int  # tokens per prefill call, 0 when there is no prefill function
    weights: str  # the name of the recipe, which may be a format's
    compressed: bool  # whether anything is stored otherwise than as fp16
    # Path of the [vocab, d_model] table (loop/embedding_table.py); None: embeddings enter, no ids.
    embed: str | None
    ropes: dict[str, dict[str, Any]]
    shards: tuple[Shard, ...]
    embed_format: str = "fp16"  # fp16 | int8
    tokenizer: tuple[str, ...] = ()  # tokenizer files
    tokenizer_class: str | None = None  # of transformers; None: files copied as they were
    tokenizer_record: str | None = None  # ids that the checkpoint's gave
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    golden: str | None = None
    # What each role is stored as (formats/recipe.py).
    recipe: dict[str, Any] = field(default_factory=dict)
    # Of the same model with the compressed weights of the packages.
    golden_as_stored: str | None = None
    # By role: formats, bytes, bits, errors.
    compression: dict[str, dict[str, Any]] = field(default_factory=dict)
    # The sha256 of every file, packages file by file.
    files: dict[str, str] = field(default_factory=dict)
    # layer -> {"experts": E, "k": k}, the layer that its attention shard "guesses", if any, and the
    # "router" file by which the host does, with the "ranking" (model/ranking.py; none: by logits).
    moe: dict[str, dict[str, Any]] = field(default_factory=dict)
    # Of layers that are half of one: the scopes of their shards.
    halves: dict[str, tuple[str, ...]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    # The digest of the checkpoint's config, and the options.
    source: dict[str, str] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)  # the model's name and commit on the Hub
    golden_key: str = ""  # of what goldens depend on
    left_out: dict[str, tuple[str, ...]] = field(default_factory=dict)  # tensors not used, by why
    lengths: tuple[int, ...] = ()  # of an encoder: tokens that its functions take, rising
    labels: tuple[str, ...] = ()  # of a token classifier: what its scores are of
    stream_scale: float = 1.0  # what hidden states are multiplied by: embeddings, and all that adds
    # What embeddings that are given are multiplied by, besides; None where it was not yet noted.
    embed_scale: float | None = None
    # By layer: what its values and its MLPs' linear branches are multiplied by.
    inner: dict[str, dict[str, float]] = field(default_factory=dict)
    tracks: dict[str, Any] = field(default_factory=dict)  # fields of Synchronisations, if any
    # By the name of an adapter that can be switched on: what is said of the model with it
    # (`golden`, `golden_as_stored`, `compression`).
    adapters: dict[str, dict[str, Any]] = field(default_factory=dict)
    early: str | None = None  # the adapters by which shards guess experts of later layers
    format: int = FORMAT

    @property
    def packages(self) -> list[Shard]:
        """What lies in packages: all but the stores of experts."""
        return [shard for shard in self.shards if shard.store is None]

    @property
    def package_form(self) -> str:
        """What its packages are: PACKAGE or ASSET."""
        return PurePosixPath(self.packages[0].path).suffix if self.packages else PACKAGE

    @property
    def lent(self) -> dict[str, Shard]:
        """The slots that a shard reads and another one keeps, and that one."""
        keepers = {slot: shard for shard in self.shards for slot in shard.states}
        read = sorted({slot for shard in self.shards for slot in shard.borrowed})
        return {slot: keepers[slot] for slot in read if slot in keepers}

    @property
    def scores(self) -> int:
        """Rows of the head: labels, or the vocabulary."""
        return len(self.labels) or self.vocab

    @property
    def synchronisations(self) -> Synchronisations | None:
        """Of parallel tracks, in each step, as planned."""
        return Synchronisations(**self.tracks) if self.tracks else None

    @property
    def walked(self) -> range | None:
        """The layers that the original computes for a golden; None for all of them."""
        last = max(self.layers, default=-1) + 1
        return None if last == self.n_layers else range(last)

    def shards_of(self, kind: str, layer: int | None = None) -> list[Shard]:
        """Shards of one kind (and layer), ordered by part."""
        return sorted(
            (s for s in self.shards if s.kind == kind and s.layer == layer), key=lambda s: s.part
        )

    def with_adapter(self, name: str | None) -> "Manifest":
        """The conversion with an adapter switched on; as it is with none. Raises UserError for one
        that it does not have."""
        if name is None:
            return self
        if name not in self.adapters:
            raise UserError(
                f"there is no adapter {name} in the conversion",
                ", ".join(self.adapters) or "no adapters",
                "convert with --adapter FOLDER --adapter-mode switch",
            )
        shards = tuple(shard.with_adapter(name) for shard in self.shards)
        return replace(self, shards=shards, adapters={}, **self.adapters[name])

    def write(self, folder: Path) -> None:
        """Write runtime_meta.json atomically, with sorted keys."""
        write_text(folder / FILE_NAME, json.dumps(self.as_json(), indent=1, sort_keys=True) + "\n")

    def as_json(self) -> dict[str, Any]:
        """What the file says. Functions name their ports by a place in `interfaces`: thousands of
        expert functions have the same few."""
        interfaces: dict[Ports, int] = {}

        def function(entry: ShardFunction) -> dict[str, Any]:
            place = interfaces.setdefault(entry.ports, len(interfaces))
            return vars(entry) | {"ports": place}

        def functions(shard: Shard) -> dict[str, Any]:
            return {name: [function(one) for one in getattr(shard, name)] for name in FUNCTIONS}

        shards = [
            vars(shard) | functions(shard) | {"store": asdict(shard.store) if shard.store else None}
            for shard in self.shards
        ]
        ports = [asdict(interface) for interface in interfaces]
        return vars(self) | {"shards": shards, "interfaces": ports}


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder/runtime_meta.json`.

    Raises UserError when it is missing, not JSON, of another format, lacks or adds fields, names a
    path outside the folder, or says of files and experts what cannot be.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise UserError(
            f"{folder} is not a finished conversion",
            f"no {FILE_NAME}",
            "run `ane-moe convert` again",
        )
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} is too large", f"{path.stat().st_size} bytes")
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("format") != FORMAT:
            raise UserError(
                f"{path} is of another version",
                f"format {data.get('format')}, not {FORMAT}",
                "convert again: run the same `ane-moe convert` command with --overwrite",
            )
        interfaces = [_ports(entry) for entry in data.pop("interfaces")]
        shards = tuple(_shard(entry, interfaces) for entry in data.pop("shards"))
        require_sound(data, (shard.path for shard in shards), path)
        manifest = Manifest(shards=shards, **{key: _frozen(value) for key, value in data.items()})
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read", f"{type(error).__name__}: {error}", "convert again"
        ) from None
    return manifest


def _shard(entry: dict[str, Any], interfaces: list[Ports]) -> Shard:
    def functions(entries: list[dict[str, Any]]) -> tuple[ShardFunction, ...]:
        placed = (one | {"ports": interfaces[one["ports"]]} for one in entries)
        return tuple(ShardFunction(**_frozen(one)) for one in placed)

    both: dict[str, Any] = {name: functions(entry.pop(name, [])) for name in FUNCTIONS}
    store = entry.pop("store", None)
    return Shard(**both, store=store_of(store) if store else None, **_frozen(entry))


def _ports(entry: dict[str, Any]) -> Ports:
    return Ports(
        **{role: tuple(Port(**_frozen(port)) for port in ports) for role, ports in entry.items()}
    )


def _frozen(value: Any) -> Any:
    """JSON lists become tuples, also inside dictionaries (`states`)."""
    if isinstance(value, list):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    return value
