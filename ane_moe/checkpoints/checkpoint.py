"""Reads a Hugging Face checkpoint folder tensor by tensor, in memory bounded by one tensor.

Nothing here knows an architecture: families say where each of our tensors lies, as a TensorSource.
"""

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np

from ane_moe.checkpoints import original_filter
from ane_moe.checkpoints.alternating_zaya import is_alternating, native_config, native_name
from ane_moe.checkpoints.coded import decoded
from ane_moe.checkpoints.folder import (
    CONFIG,
    SINGLE,
    adapter_beside,
    passed_over,
    require_folder,
    weight_files,
    weight_map,
)
from ane_moe.checkpoints.gguf.model import gguf_file, open_gguf
from ane_moe.checkpoints.hub import local_folder, origin
from ane_moe.checkpoints.key_names import example, model_names
from ane_moe.checkpoints.left_out import left_out
from ane_moe.checkpoints.packed import plain_tensors
from ane_moe.checkpoints.packed.facts import plain_config, side_facts
from ane_moe.checkpoints.remote import placed, placed_file, url_of
from ane_moe.checkpoints.safetensors_header import read_header
from ane_moe.checkpoints.stored_tensor import Codec, StoredTensor
from ane_moe.checkpoints.weight_file import RemoteFile, opened, read_exactly
from ane_moe.errors import UserError
from ane_moe.half import STORED, narrow_into, narrowed, widened
from ane_moe.json_file import read_json
from ane_moe.model.weight import EMBEDDING, HEAD, Weight, WeightName
from ane_moe.wording import counted, listed

Piece = tuple[int, np.ndarray]  # first element, numbers
CHUNK_ELEMENTS = 1 << 16  # read, hashed, converted and checked while they are in the L2 cache
FP16_INF_BITS = 0x7C00
# A `constexpr_*` operation (coremltools, iOS 18) gives the type of its scale or palette: fp16.
OVERFLOW_ADVICE = (
    "no --compress format helps, since each expands to fp16 for the engine: check the tensor for "
    "damage, or divide it and multiply its counterpart (`up` and `down`) by the same power of two"
)
VOCABULARY = (EMBEDDING, HEAD)  # ours, with a row for each token


class Hasher(Protocol):
    """What hashlib's objects offer."""

    def update(self, data: Any, /) -> None: ...


@dataclass(frozen=True)
class TensorSource:
    """Where one of our tensors lies in a checkpoint, and what turns the stored values into it.

    Out of the stored tensor `key`, expected to have `stored_shape`: entry `index` of the first axis
    (one expert of a fused tensor), then `rows` [first, last) of what is left, then `columns` of the
    last axis (first, last, step), then the transpose, then of `runs` (size, first, last) of rows
    those from first to last of each, then of each run of `pairs` rows the even ones first, then
    plus `offset`, times `scale`. A `stack` of matrices is one here: they lie one below the other,
    or side by side. `weight` is our tensor's row: what it is for.
    """

    name: WeightName
    key: str
    stored_shape: tuple[int, ...]
    index: int | None = None
    rows: tuple[int, int] | None = None
    transpose: bool = False
    scale: float = 1.0
    weight: Weight | None = None
    columns: tuple[int, int, int] | None = None
    pairs: int = 0
    runs: tuple[int, int, int] | None = None
    offset: float = 0.0
    # Not in the repr: that of a source is in keys of conversions.
    stack: Literal["", "below", "beside"] = field(default="", repr=False)

    @property
    def role(self) -> str | None:
        """What a recipe calls our tensor; None when it stays fp16, whatever the recipe."""
        return self.weight.role if self.weight else None

    @property
    def fold(self) -> str:
        """The multiplier of the model that `scale` is."""
        return self.weight.fold if self.weight else ""

    @property
    def reads(self) -> WeightName:
        """The activation that enters our tensor."""
        return self.name.beside(self.weight.reads if self.weight else "")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of our tensor."""
        if self.stack:
            count, rows, width = self.region_shape
            return (count * rows, width) if self.stack == "below" else (rows, count * width)
        columns = self.region_shape[-1]
        if self.columns is not None:
            columns = len(range(*self.columns))
        kept = (*self.region_shape[:-1], columns)
        kept = kept[::-1] if self.transpose else kept
        if self.runs is None:
            return kept
        size, first, last = self.runs
        return (kept[0] // size * (last - first), *kept[1:])

    @property
    def in_place(self) -> bool:
        """Whether our tensor is the region that is read, element for element."""
        moved = self.stack == "beside"
        return not (moved or self.transpose or self.columns or self.pairs or self.runs)

    def arranged(self, region: np.ndarray) -> np.ndarray:
        """A view of the region, of shape `region_shape`, whose elements are in our tensor's order;
        its own shape may have more axes."""
        if self.stack == "beside":
            return region.swapaxes(0, 1)
        view = region if self.columns is None else region[..., slice(*self.columns)]
        view = view.T if self.transpose else view
        if not (self.pairs or self.runs):
            return view
        assert view is region  # of an array in another order, `reshape` would give a copy
        if self.runs is not None:
            size, first, last = self.runs
            view = view.reshape(-1, size, *view.shape[1:])[:, first:last]
        if not self.pairs:
            return view
        rest = view.shape[2:] if self.runs else view.shape[1:]
        return view.reshape(-1, self.pairs // 2, 2, *rest).swapaxes(1, 2)

    @property
    def region_shape(self) -> tuple[int, ...]:
        left = self.stored_shape if self.index is None else self.stored_shape[1:]
        return left if self.rows is None else (self.rows[1] - self.rows[0], *left[1:])

    @property
    def region(self) -> tuple[int, int]:
        """First element in the stored tensor, and number of elements: always one contiguous run."""
        left = self.stored_shape if self.index is None else self.stored_shape[1:]
        first_row = 0 if self.rows is None else self.rows[0]
        start = (self.index or 0) * math.prod(left) + first_row * math.prod(left[1:])
        return start, math.prod(self.region_shape)

    def part(self, first: int, last: int) -> Self:
        """The source of rows [first, last) of this tensor, which has to be stored as it is."""
        if not self.in_place:
            raise ValueError(f"{self.name} is stored in another order: its rows are apart")
        start = 0 if self.rows is None else self.rows[0]
        return replace(self, rows=(start + first, start + last))


@dataclass
class Checkpoint:
    """An open checkpoint. Cheap to open, holds no file open; not for use by several threads.

    `folder` is the file where the model is in GGUF, the first of its parts. `tensors` have the
    names of key_names.py; a StoredTensor's `key` is the one in the file.
    `notes` are sentences for the user on how it was read; `forms` the quantised forms (packed/)
    that were found in it; `origin` its name and commit on the Hub, where it is from there.
    """

    folder: Path
    config: dict[str, Any]
    generation: dict[str, Any]  # generation_config.json, empty when there is none
    tensors: dict[str, StoredTensor]
    notes: tuple[str, ...] = ()
    forms: tuple[str, ...] = ()
    origin: dict[str, str] = field(default_factory=dict)
    _decoded: dict[tuple[Codec, tuple[int, int]], list[Piece]] = field(
        init=False, repr=False, default_factory=dict
    )
    _raw: np.ndarray = field(init=False, repr=False)
    _bits: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._raw = np.empty(CHUNK_ELEMENTS * 4, np.uint8)
        self._bits = np.empty(CHUNK_ELEMENTS, np.uint16)

    @property
    def config_file(self) -> Path:
        """What the configuration is read from, for people."""
        return self.folder if self.folder.is_file() else self.folder / CONFIG

    def __reduce__(self) -> tuple[type["Checkpoint"], tuple[Any, ...]]:
        """Sent to another process without the reading buffers, which it makes anew."""
        return type(self), tuple(getattr(self, part.name) for part in fields(self) if part.init)

    def holding(self, keys: Collection[str]) -> "Checkpoint":
        """The same checkpoint with the stored tensors `keys` only: small enough to send to a
        worker."""
        return replace(self, tensors={key: self.tensors[key] for key in keys})

    def require(
        self,
        sources: Mapping[WeightName, TensorSource],
        ignore: Collection[str] = (),
        beside: Mapping[str, str] | None = None,
    ) -> None:
        """Check, before anything is read, that `sources` and the stored tensors agree.

        Raises UserError for tensors nobody reads (but see `left_out`), and for a wrong shape or an
        unsupported dtype.
        """
        self.left_out(sources, ignore, beside)
        self._require_one_vocabulary(sources)
        for source in sources.values():
            self._require_sound(source)

    def left_out(
        self,
        sources: Mapping[WeightName, TensorSource],
        ignore: Collection[str] = (),
        beside: Mapping[str, str] | None = None,
    ) -> dict[str, tuple[str, ...]]:
        """The tensors that no source reads, by why that is right (left_out.py). Raises UserError
        for others."""
        extra = self.tensors.keys() - {source.key for source in sources.values()}
        predicting = _predicting(self.config)
        return left_out(extra, ignore, str(self.folder), predicting, beside)

    def read(
        self, source: TensorSource, out: np.ndarray | None = None, hasher: Hasher | None = None
    ) -> np.ndarray:
        """One of our tensors, fp16, C-contiguous, of shape `source.shape`; into `out` when given,
        which is faster.

        `hasher` is fed what `digest` would feed it. Raises UserError when a stored value is NaN or
        infinite, or overflows fp16, or when the file has become shorter.
        """
        if out is not None and (
            out.shape != source.shape or out.dtype != np.float16 or not out.flags.c_contiguous
        ):
            raise ValueError(
                f"out must be contiguous fp16 {source.shape}, not {out.dtype} {out.shape}"
            )
        count = source.region[1]
        direct = out is not None and source.in_place
        flat = out.reshape(-1) if direct and out is not None else np.empty(count, np.float16)
        if hasher is not None:
            hasher.update(self._frame(source))
        for first, stored in self._chunks(source):
            if hasher is not None:
                hasher.update(stored.data)
            narrow = flat[first : first + len(stored)]
            self._narrow(stored, source, narrow)
            bits = np.bitwise_and(narrow.view(np.uint16), 0x7FFF, out=self._bits[: len(narrow)])
            if bits.max() >= FP16_INF_BITS:
                raise self._not_finite(source)
        arranged = source.arranged(flat.reshape(source.region_shape))
        if out is None or direct:
            return np.ascontiguousarray(arranged).reshape(source.shape)
        out.reshape(arranged.shape)[...] = arranged
        return out

    def made(self, key: str) -> np.ndarray:
        """A tensor that is made of a stored one, fp32, whole."""
        tensor = self.tensors[key]
        source = TensorSource(EMBEDDING, key, tensor.shape)
        pieces = [
            widened(stored, tensor.dtype) * np.float32(tensor.scale)
            for _, stored in self._chunks(source)
        ]
        return np.concatenate(pieces).reshape(tensor.shape)

    def taken_apart(self, source: TensorSource) -> dict[str, np.ndarray]:
        """What one of our tensors is made of where it is stored in codes: `codes`, and `scales` and
        `zeros` where there are any, each fp32 of shape `source.shape`, a number for each
        element. What is folded into the tensor is in its scales."""
        tensor = self.tensors[source.key]
        pieces = tensor.codec.pieces if tensor.codec else None
        if pieces is None:
            raise ValueError(f"{source.name} is not stored in codes that can be taken apart")
        found = {"codes": self._elements(source, pieces.codes)}
        if pieces.scales is not None:
            scales = self._elements(source, pieces.scales)
            found["scales"] = scales * np.float32(source.scale * tensor.scale)
        if pieces.zeros is not None:
            found["zeros"] = self._elements(source, pieces.zeros)
        return found

    def _elements(self, source: TensorSource, codec: Codec) -> np.ndarray:
        flat = np.concatenate([numbers for _, numbers in self._numbers(source, codec)])
        arranged = source.arranged(flat.reshape(source.region_shape))
        return np.ascontiguousarray(arranged).reshape(source.shape)

    def digest(self, sources: Iterable[TensorSource]) -> str:
        """sha256 (hex) over the stored bytes of `sources`, in order, each preceded by its name,
        place and transform."""
        hasher = hashlib.sha256()
        for source in sources:
            self.feed(source, hasher)
        return hasher.hexdigest()

    def feed(self, source: TensorSource, hasher: Hasher) -> None:
        """Feed `hasher` what `read` would feed it, without converting anything."""
        hasher.update(self._frame(source))
        for _, stored in self._chunks(source):
            hasher.update(stored.data)

    def _narrow(self, stored: np.ndarray, source: TensorSource, narrow: np.ndarray) -> None:
        tensor = self.tensors[source.key]
        scale = source.scale * tensor.scale
        if source.weight and source.weight.centred:  # a short vector: all of it is in one piece
            wide = widened(stored, tensor.dtype) * np.float32(scale)
            narrow[...] = narrowed(wide - wide.max())
        elif source.offset:
            wide = widened(stored, tensor.dtype) * np.float32(tensor.scale)
            narrow[...] = narrowed((wide + np.float32(source.offset)) * np.float32(source.scale))
        else:
            narrow_into(narrow, stored, tensor.dtype, scale)

    def _chunks(self, source: TensorSource) -> Iterable[tuple[int, np.ndarray]]:
        """(first element, stored numbers) of each piece of `source`; valid until the next piece."""
        tensor = self.tensors[source.key]
        stored = STORED[tensor.dtype]
        start, count = source.region
        if tensor.codec is not None:
            for first, numbers in self._numbers(source, tensor.codec):
                for begin in range(0, len(numbers), CHUNK_ELEMENTS):
                    yield first + begin, numbers[begin : begin + CHUNK_ELEMENTS]
            return
        with opened(tensor.path) as stream:
            stream.seek(tensor.offset + start * stored.itemsize)
            for first in range(0, count, CHUNK_ELEMENTS):
                raw = self._raw[: min(CHUNK_ELEMENTS, count - first) * stored.itemsize]
                read_exactly(stream, raw, tensor.path)
                yield first, raw.view(stored)

    def _numbers(self, source: TensorSource, codec: Codec) -> Iterable[Piece]:
        """The numbers of what is read for `source`. Where it takes some columns of that, they are
        kept for whoever takes the others next: gate and up of an expert."""
        if source.columns is None:
            return decoded(codec, *source.region)
        place = (codec, source.region)
        if place in self._decoded:
            return self._decoded.pop(place)
        for other in [other for other in self._decoded if other[1] != source.region]:
            del self._decoded[other]
        self._decoded[place] = list(decoded(codec, *source.region))
        return self._decoded[place]

    def _frame(self, source: TensorSource) -> bytes:
        facts = (
            str(source.name),
            source.key,
            self.tensors[source.key].dtype,
            source.stored_shape,
            source.index,
            source.rows,
            source.transpose,
            source.scale,
            bool(source.weight and source.weight.centred),
        )
        rare = (source.columns, source.pairs, self.tensors[source.key].scale)
        rarer: tuple[object, ...] = () if source.runs is None else (source.runs,)
        rarer += (source.offset,) if source.offset else ()
        rarer += (source.stack,) if source.stack else ()
        if (*rare, *rarer) != (None, 0, 1.0):  # others keep the keys that they had
            return repr((*facts, *rare, *rarer)).encode() + b"\n"
        return repr(facts).encode() + b"\n"

    def _require_one_vocabulary(self, sources: Mapping[WeightName, TensorSource]) -> None:
        """Name a vocabulary that was resized without its config.json."""
        ends = [source for name, source in sources.items() if name in VOCABULARY]
        stored = {source.key: self.tensors[source.key] for source in ends}
        if any(stored[source.key].shape[1:] != source.stored_shape[1:] for source in ends):
            return  # of another width: of another model
        rows = {tensor.shape[0] for tensor in stored.values()}
        if rows == {source.stored_shape[0] for source in ends}:
            return
        sizes = ", ".join(f"{t.key} has {counted(t.shape[0], 'row')}" for t in stored.values())
        advice = "embedding and head are of two vocabularies: resize the model again, and save it"
        if len(rows) == 1:
            advice = f"the vocabulary was resized: set vocab_size to {min(rows)} in {CONFIG}"
        stale = f"{self.config_file}: vocab_size {self.config.get('vocab_size')} is stale"
        raise UserError(stale, sizes, advice)

    def _require_sound(self, source: TensorSource) -> None:
        tensor = self.tensors[source.key]
        if tensor.dtype not in STORED:
            raise UserError(
                f"{tensor.key} is stored as {tensor.dtype}",
                do=f"supported: {', '.join(STORED)}; dequantise the checkpoint first",
            )
        if tensor.shape != source.stored_shape:
            derived = source.name.part == "attn" and self.config.get("head_dim") is None
            raise UserError(
                f"{tensor.key} has the wrong shape",
                f"{list(tensor.shape)} instead of {list(source.stored_shape)}",
                f"{CONFIG} has no head_dim"
                if derived
                else f"{CONFIG} and the weights are of different models",
            )

    def _not_finite(self, source: TensorSource) -> UserError:
        """Reads `source` once more to say what is wrong with it."""
        tensor = self.tensors[source.key]
        scale = source.scale * tensor.scale
        broken, largest, overflowing = 0, 0.0, 0
        for _, stored in self._chunks(source):
            values = widened(stored, tensor.dtype).astype(np.float64)
            finite = np.abs(values[np.isfinite(values)] * scale)
            broken += len(values) - len(finite)
            overflowing += int(np.isinf(narrowed(finite)).sum())
            largest = max(largest, float(finite.max(initial=0.0)))
        where = f"{self.tensors[source.key].key} ({source.name})"
        if broken:
            return UserError(
                f"{where} holds {broken} NaN or infinite values", do="the checkpoint is damaged"
            )
        return UserError(
            f"{where} overflows fp16 (max |w| = {largest:g})",
            f"{counted(overflowing, 'value')} above 65504",
            OVERFLOW_ADVICE,
        )


def _predicting(config: Mapping[str, Any]) -> range:
    """The layers after the model's own, where its configuration counts any."""
    text = config.get("text_config")
    config = text if isinstance(text, dict) else config
    own, further = config.get("num_hidden_layers"), config.get("num_nextn_predict_layers")
    if isinstance(own, int) and isinstance(further, int):
        return range(own, own + further)
    return range(0)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read the configuration and the headers of the checkpoint folder `path`, of a GGUF file, or of
    a model that it names on the Hub or by another address; no weights yet.

    Raises UserError when it is not a readable checkpoint in safetensors or GGUF form.
    """
    folder = local_folder(path)
    if file := gguf_file(folder):
        gguf = open_gguf(file, placed_file)
        from_hub, where = origin(file), placed_file(file)
        notes = gguf.notes
        if isinstance(where, RemoteFile):
            notes = (f"{where}, by byte ranges", *notes)
        if from_hub:
            notes = ("{hub} at {revision}".format(**from_hub), *notes)
        facts = (gguf.config, gguf.generation, gguf.tensors, notes, gguf.kinds, from_hub)
        return Checkpoint(file, *facts)
    folder = require_folder(folder)
    config = read_json(folder / CONFIG)
    generation = folder / "generation_config.json"
    stored: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        header = placed(read_header(file), folder)
        if twice := [key for key in header if key in stored]:
            count = counted(len(twice), "tensor")
            raise UserError(f"{folder} stores {count} twice", listed(twice))
        stored |= header
    _require_indexed(folder, stored)
    names, alternating, original = model_names(stored), "", ""
    renamed = example(names) and f"other tensor names than transformers gives: {example(names)}"
    if is_alternating(config, names.values()):
        alternating = "attention and experts in layers of their own: read as transformers has them"
        config = native_config(config, str(folder / CONFIG))
        layers = 2 * config["num_hidden_layers"]
        names = {key: native_name(name, layers) for key, name in names.items()}
    tensors = {names[key]: tensor for key, tensor in stored.items()}
    if original_filter.is_original(tensors):
        original = "the model's first form, with names of its own: read as transformers has it"
        config = original_filter.native_config(config, tensors, str(folder / CONFIG))
        tensors = original_filter.native_tensors(config, tensors)
    tensors, forms = plain_tensors(config, side_facts(folder), tensors)
    decoding, from_hub = "", origin(folder)
    if forms:
        config = plain_config(config)
        decoding = f"quantised ({', '.join(forms)}): decoded exactly while it is read"
    fetched = from_hub and "{hub} at {revision}".format(**from_hub)
    apart = url_of(folder) and f"{url_of(folder)}, by byte ranges"
    read = (fetched, apart, renamed, alternating, original, decoding)
    said = (*read, passed_over(folder), adapter_beside(folder))
    return Checkpoint(
        folder,
        config,
        read_json(generation) if generation.is_file() else {},
        tensors,
        tuple(str(sentence) for sentence in said if sentence),
        tuple(forms),
        from_hub,
    )


def _require_indexed(folder: Path, tensors: Collection[str]) -> None:
    if (folder / SINGLE).is_file():
        return
    if missing := [key for key in weight_map(folder) if key not in tensors]:
        lacking = f"{counted(len(missing), 'tensor')} that its index names: {listed(missing)}"
        raise UserError(f"{folder} lacks {lacking}", do="download it again")
