"""The model as its packages store it: every tensor read back from them, and a checkpoint made of
these.

Hugging Face's code on that checkpoint computes what the compressed weights mean. Shards that agree
with it were converted right, whatever the compression lost.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ane_moe.checkpoints.checkpoint import Checkpoint, TensorSource
from ane_moe.errors import UserError
from ane_moe.formats.expand import expand
from ane_moe.formats.recipe import Choice, find_format, recipe_of
from ane_moe.loop.embedding_table import open_embeddings
from ane_moe.manifest import Manifest, Shard
from ane_moe.mlprogram.reader import read_program
from ane_moe.model.weight import EMBEDDING, HEAD, Place, WeightName
from ane_moe.opened import Model
from ane_moe.runtime.reference.weight_values import weight_values

PREFIX = "w_"
# Parameters that are no tensors of the model.
MADE = (".recover_in", ".recover_out", "select.weight")
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


def stored_weights(folder: Path, manifest: Manifest) -> Iterator[StoredWeight]:
    """Every tensor of every shard, expanded by the reference runtime's operations, one at a time;
    the embedding table too where it is compressed."""
    for shard in manifest.shards:
        program = read_program(folder / shard.path)
        for experts, functions in shard.copies.items():
            values: dict[str, np.ndarray] = {}
            for name, value in weight_values(program.functions[functions[0].name]):
                if name.startswith(PREFIX):
                    values[name.removeprefix(PREFIX).replace("__", ".")] = value
            for name in values:
                if not name.endswith(MADE):
                    yield _joined(shard, shard.place(experts), name, values)
    if manifest.embed_format != "fp16":
        yield StoredWeight(EMBEDDING, None, open_embeddings(folder, manifest)[:], False)


def _joined(
    shard: Shard, place: Place, name: str, values: Mapping[str, np.ndarray]
) -> StoredWeight:
    tensor, value = place.name(name), values[name]
    stem = name.removesuffix(".weight")
    into, out = values.get(f"{stem}.recover_in"), values.get(f"{stem}.recover_out")
    rows = shard.rows if tensor == HEAD else None
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


def write_as_stored(
    model: Model, folder: Path, manifest: Manifest, out: Path
) -> dict[str, RoleError]:
    """Write the checkpoint `out`: that of `model` with the weights that the conversion in `folder`
    stores.

    It takes as much disk as the original, twice that where a multiplier is folded in or directions
    are apart. Returns errors by role. Raises UserError when the disk is too full or the conversion
    has tensors the checkpoint lacks.
    """
    checkpoint, sources = model.checkpoint, model.sources
    out.mkdir(parents=True)
    places = _untied(sources)
    (out / "config.json").write_text(json.dumps(checkpoint.config | {"tie_word_embeddings": False}))
    if checkpoint.generation:
        (out / "generation_config.json").write_text(json.dumps(checkpoint.generation))
    wide = {
        place.key for place in places.values() if place.scale != 1 or _choice(manifest, place).rank
    }
    shapes = {place.key: place.stored_shape for place in places.values()}
    stored = _allocate(shapes, wide, out / "model.safetensors")
    for name, source in sources.items():  # what no shard holds: the embedding, layers left out
        _fill(stored[places[name].key], source, checkpoint.read(source))
    errors: dict[str, RoleError] = {}
    for weight in stored_weights(folder, manifest):
        if weight.name not in sources:
            raise UserError(
                f"{folder} holds a tensor that the checkpoint lacks",
                str(weight.name),
                "give the checkpoint that was converted",
            )
        source = (
            sources[weight.name] if weight.rows is None else sources[weight.name].part(*weight.rows)
        )
        _measure(errors, checkpoint, source, weight, manifest)
        _fill(stored[places[weight.name].key], source, weight.value)
    for array in stored.values():
        array.flush()
    return errors


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


def _allocate(
    shapes: Mapping[str, tuple[int, ...]], wide: set[str], path: Path
) -> dict[str, np.memmap]:
    """A safetensors file with room for tensors of these shapes, fp16 or (`wide`) fp32, as writable
    arrays."""
    places: dict[str, tuple[type, int]] = {}
    header: dict[str, dict[str, Any]] = {}
    end = 0
    for key, shape in sorted(shapes.items()):
        dtype = np.float32 if key in wide else np.float16
        size = math.prod(shape) * np.dtype(dtype).itemsize
        header[key] = {"dtype": "F32" if key in wide else "F16", "shape": list(shape)}
        header[key]["data_offsets"] = [end, end + size]
        places[key] = (dtype, end)
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    if (free := shutil.disk_usage(path.parent).free) < end:
        raise UserError(
            "the disk is too full for the model as it is stored",
            f"{free / 1e6:.0f} MB free, {end / 1e6:.0f} MB needed",
            "free some space, or set TMPDIR to another disk",
        )
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    first = 8 + len(text)
    return {
        key: np.memmap(path, dtype, "r+", first + place, (math.prod(header[key]["shape"]),))
        for key, (dtype, place) in places.items()
    }


def _fill(stored: np.memmap, source: TensorSource, value: np.ndarray) -> None:
    """Put one of our tensors where the checkpoint has it, its folded multiplier taken out again."""
    start, count = source.region
    flat = value.reshape(source.shape)
    flat = flat.T if source.transpose else flat
    if source.scale != 1:
        flat = flat.astype(np.float32) / source.scale
    stored[start : start + count] = flat.reshape(-1)
