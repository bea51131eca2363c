"""The model as its packages store it: every tensor read back from them, and put where a checkpoint
has it.

Hugging Face's code on these tensors computes what the compressed weights mean. Shards that agree
with it were converted right, whatever the compression lost.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ane_moe.checkpoints.checkpoint import Checkpoint, TensorSource
from ane_moe.emit.coreai.asset import read_weights, weight_names
from ane_moe.errors import UserError
from ane_moe.expert_record import Store
from ane_moe.formats.encoded import Encoded
from ane_moe.formats.expand import expand
from ane_moe.formats.recipe import Choice, find_format, recipe_of
from ane_moe.loop.embedding_table import open_embeddings
from ane_moe.loop.expert_store import StoreFile, expanded
from ane_moe.manifest import Manifest, Shard, ShardFunction
from ane_moe.mlprogram.reader import read_program
from ane_moe.model.routed import EARLY
from ane_moe.model.weight import EMBEDDING, HEAD, HEAD_BIAS, Place, WeightName
from ane_moe.opened import Model
from ane_moe.package_form import ASSET
from ane_moe.runtime.reference.weight_values import weight_values

PREFIX = "w_"
# Parameters that are no tensors of the model.
DIRECTIONS = (".recover_in", ".recover_out")
MADE = ("select.weight", EARLY)
# The same in every family (families/keys.py).
HEAD_KEY, EMBED_KEY = ("lm_head.weight", "model.embed_tokens.weight")


@dataclass(frozen=True)
class StoredWeight:
    """One of our tensors as a shard holds it: fp16, or fp32 with directions kept apart added back.
    `rows` are those of the tensor that the shard has (None: all); `directions` says whether any
    were apart."""

    name: WeightName
    rows: tuple[int, int] | None
    value: np.ndarray
    directions: bool


Wanted = Callable[[WeightName], bool]
Values = dict[str, np.ndarray]  # by parameter


def stored_weights(
    shards: Iterable[Shard], folder: Path, wanted: Wanted = lambda _: True
) -> Iterator[StoredWeight]:
    """The tensors of `shards` that are `wanted`, expanded by the reference runtime's operations,
    one at a time, or an expert of a store at a time; others are not read."""
    for shard in shards:
        if shard.store is not None:
            yield from _from_store(shard, shard.store, folder, wanted)
            continue
        values_of = _reader(folder / shard.path)
        for experts, functions in shard.copies.items():
            place = shard.place(experts)

            def reads(name: str, place: Place = place) -> bool:
                return not name.endswith(MADE) and wanted(place.name(_stem(name)))

            values = values_of(functions[0], reads)
            for name in [name for name in values if not name.endswith(DIRECTIONS)]:
                yield _joined(shard, place, name, values)
                del values[name]


def _from_store(shard: Shard, store: Store, folder: Path, wanted: Wanted) -> Iterator[StoredWeight]:
    file = StoreFile(folder / shard.path, store, shard.content_key)
    record, whole = store.record, store.record.expanded
    read, buffer = (np.empty(one.size, np.uint8) for one in (record, whole))
    for expert in range(store.count):
        place = shard.place((expert,))
        stems = {weight.name: place.name(_stem(weight.name)) for weight in record.weights}
        if not any(map(wanted, stems.values())):
            continue
        file.read(expert, read)
        values = expanded(record, read, whole, buffer)
        for name in [name for name in values if not name.endswith(DIRECTIONS)]:
            if wanted(stems[name]):
                yield _joined(shard, place, name, values)


def _reader(path: Path) -> Callable[[ShardFunction, Callable[[str], bool]], Values]:
    """What gives the parameters of a function of a package that are wanted, expanded."""
    if path.suffix == ASSET:
        return partial(_of_asset, path)
    program = read_program(path)

    def values(entry: ShardFunction, reads: Callable[[str], bool]) -> Values:
        constants = weight_values(program.functions[entry.entry], lambda n: reads(_parameter(n)))
        return {_parameter(constant): value for constant, value in constants}

    return values


def _of_asset(path: Path, entry: ShardFunction, reads: Callable[[str], bool]) -> Values:
    """Copies of one asset, where there are any, are told apart by what comes before the name of
    their functions: weights of expert_007_t16 are called `expert_007/...`."""
    copies = {name.rpartition("/")[0] for name in weight_names(path)}
    copy = entry.entry.rpartition("_")[0]
    copy = copy if copy in copies else ""

    def mine(name: str) -> bool:
        of, _, parameter = name.rpartition("/")
        return of == copy and reads(parameter)

    return {
        name.rpartition("/")[2]: _as_in_graphs(value) for name, value in read_weights(path, mine)
    }


def _as_in_graphs(value: np.ndarray | Encoded) -> np.ndarray:
    """`(out, in, 1, 1)` of a matrix."""
    return expand(value)[:, :, None, None] if isinstance(value, Encoded) else value


def _parameter(constant: str) -> str:
    """The block's parameter that a constant of a graph is, or the constant's own name."""
    return constant.removeprefix(PREFIX).replace("__", ".")


def _stem(parameter: str) -> str:
    """The parameter to which directions kept apart belong; others belong to themselves."""
    stem, _, last = parameter.rpartition(".")
    return f"{stem}.weight" if f".{last}" in DIRECTIONS else parameter


def _joined(
    shard: Shard, place: Place, name: str, values: Mapping[str, np.ndarray]
) -> StoredWeight:
    tensor, value = place.name(name), values[name]
    stem = name.removesuffix(".weight")
    into, out = values.get(f"{stem}.recover_in"), values.get(f"{stem}.recover_out")
    rows = shard.rows if tensor in (HEAD, HEAD_BIAS) else None
    if into is None or out is None:
        return StoredWeight(tensor, rows, value, False)
    directions = out[:, :, 0, 0].astype(np.float32) @ into[:, :, 0, 0].astype(np.float32)
    return StoredWeight(tensor, rows, value[:, :, 0, 0].astype(np.float32) + directions, True)


@dataclass
class RoleError:
    """Squared errors of the matrices of one role against the checkpoint, and of the weights
    themselves. `bare` is what the error would be without directions kept apart, 0 where there are
    none."""

    squared: float = 0.0
    total: float = 0.0
    bare: float = 0.0
    layers: dict[int, list[float]] = field(default_factory=dict)  # squared, total and bare by layer

    def add(self, layer: int | None, squared: float, total: float, bare: float) -> None:
        self.squared, self.total, self.bare = (
            self.squared + squared,
            self.total + total,
            self.bare + bare,
        )
        if layer is not None:
            sums = self.layers.setdefault(layer, [0.0, 0.0, 0.0])
            self.layers[layer] = [a + b for a, b in zip(sums, (squared, total, bare), strict=True)]


class StoredTensors:
    """The tensors of `model`'s checkpoint with the weights that the conversion in `folder` stores,
    for `StreamedModel`; of layers that it does not hold, the checkpoint's own in fp16.

    `errors` are by role, of all that has been opened. Raises UserError when the conversion has
    tensors that the checkpoint lacks.
    """

    def __init__(self, model: Model, folder: Path, manifest: Manifest):
        self.folder, self._manifest, self._conversion = model.checkpoint.folder, manifest, folder
        self.config = model.checkpoint.config | {"tie_word_embeddings": False}
        self.errors: dict[str, RoleError] = {}
        self._checkpoint, self._sources = model.checkpoint, model.sources
        self._places = _untied(model.sources)
        self._names: dict[str, list[WeightName]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for name, place in self._places.items():
            self._names.setdefault(place.key, []).append(name)
            wide = place.scale != 1 or place.offset or _choice(manifest, place).rank
            before = self.dtypes.get(place.key, torch.float16)
            self.dtypes[place.key] = torch.float32 if wide else before
        self.origins = {key: key for key in self._names}

    @contextmanager
    def opened(self, names: Collection[str]) -> Iterator[dict[str, torch.Tensor]]:
        """Read the packages' weights, and measure them against the checkpoint's."""
        ours = {name for key in names for name in self._names[key]}
        tensors = {key: torch.empty(self._shape(key), dtype=self.dtypes[key]) for key in names}
        filled = set()
        for weight in self._stored(ours):
            source = self._sources[weight.name]
            if weight.rows is not None:
                source = source.part(*weight.rows)
            _measure(self.errors, self._checkpoint, source, weight, self._manifest)
            _fill(tensors[self._places[weight.name].key], source, weight.value)
            filled.add(weight.name)
        for name in ours - filled:
            source = self._sources[name]
            _fill(tensors[self._places[name].key], source, self._checkpoint.read(source))
        yield tensors

    def _stored(self, ours: Collection[WeightName]) -> Iterator[StoredWeight]:
        """Those of our tensors that the conversion holds."""
        layers = {name.layer for name in ours}
        shards = [shard for shard in self._manifest.shards if layers & _layers(shard)]

        def wanted(name: WeightName) -> bool:
            if name not in self._sources:
                raise UserError(
                    f"{self._conversion} holds a tensor that the checkpoint lacks",
                    str(name),
                    "give the checkpoint that was converted",
                )
            return name in ours

        yield from stored_weights(shards, self._conversion, wanted)
        if EMBEDDING in ours and self._manifest.embed_format != "fp16":
            table = open_embeddings(self._conversion, self._manifest)
            yield StoredWeight(EMBEDDING, None, table[:], False)

    def _shape(self, key: str) -> tuple[int, ...]:
        return self._places[self._names[key][0]].stored_shape


def _layers(shard: Shard) -> set[int | None]:
    """The layers that a shard holds; the head is of none."""
    return {*(shard.place(()).layers or (None,))}


def _untied(sources: Mapping[WeightName, TensorSource]) -> dict[WeightName, TensorSource]:
    """Where each of our tensors goes: where it was, but head and embedding apart though one tensor
    was stored for both (they may be stored in different formats)."""
    places = dict(sources)
    if sources[HEAD].key == sources[EMBEDDING].key:
        as_head = sources[HEAD].key == HEAD_KEY
        name, key = (EMBEDDING, EMBED_KEY) if as_head else (HEAD, HEAD_KEY)
        places[name] = replace(sources[name], key=key)
    return places


def _measure(
    errors: dict[str, RoleError],
    checkpoint: Checkpoint,
    source: TensorSource,
    weight: StoredWeight,
    manifest: Manifest,
) -> None:
    role, layer = source.role, weight.name.layer
    if role is None:
        return
    original = checkpoint.read(source).astype(np.float32)
    bare = 0.0
    if weight.directions:
        encoded = find_format(_choice(manifest, source).format).encode(original.astype(np.float16))
        bare = 0.0 if encoded is None else _squares(expand(encoded) - original)
    value = weight.value.reshape(original.shape)
    errors.setdefault(role, RoleError()).add(
        layer, _squares(value - original), _squares(original), bare
    )


def _squares(values: np.ndarray) -> float:
    flat = values.astype(np.float32).reshape(-1)
    return float(np.dot(flat, flat))


def _choice(manifest: Manifest, source: TensorSource) -> Choice:
    return recipe_of(manifest.weights, manifest.recipe).choice(source.name, source.role)


def _fill(stored: torch.Tensor, source: TensorSource, value: np.ndarray) -> None:
    """Put one of our tensors where the checkpoint has it, what was folded in taken out again."""
    start, count = source.region
    if source.scale != 1 or source.offset:
        value = value.astype(np.float32) / source.scale - source.offset
    region = stored.numpy().reshape(-1)[start : start + count].reshape(source.region_shape)
    place = source.arranged(region)
    place[...] = value.reshape(place.shape)
