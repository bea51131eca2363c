"""runtime_meta.json: everything a runtime needs to know of a conversion, and nothing it has to guess.

Written last, so its presence means the conversion is complete. All paths are relative to its own folder.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ane_moe.errors import UserError

FILE_NAME = "runtime_meta.json"
FORMAT = 1


@dataclass(frozen=True)
class ShardFunction:
    """One entry point: `tokens` is T, the number of tokens in a call."""

    name: str
    tokens: int


@dataclass(frozen=True)
class Shard:
    """One `.mlpackage`. kind: attn, moe, dense, experts, stack, lm_head. `layer` is None for lm_head.

    A stack holds consecutive whole `layers`, the first of them `layer`.

    `part`/`parts` number the pieces of a split layer (their outputs are added) or the vocabulary slices of the head
    (their outputs are concatenated; `rows` is the (first, last + 1) vocabulary range). `experts` are the expert
    indices the shard holds; `groups` those of each expert function, where they are not neighbours. `states` maps state
    names to shapes; with `state = "explicit"` in the manifest the same names are inputs, and outputs called
    `<name>_out`.
    """

    path: str
    kind: str
    layer: int | None
    functions: tuple[ShardFunction, ...]
    part: int = 0
    parts: int = 1
    experts: tuple[int, ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()
    layers: tuple[int, ...] = ()
    rows: tuple[int, int] | None = None
    rope: str | None = None                 # name of the rotary table the attention reads
    window: int | None = None
    states: dict[str, tuple[int, ...]] = field(default_factory=dict)
    weight_bytes: int = 0
    content_key: str = ""


@dataclass(frozen=True)
class Manifest:
    """The whole conversion. `ropes` gives each rotary table as inv_freq and attention_factor (see RopeSpec)."""

    family: str
    d_model: int
    vocab: int
    layers: tuple[int, ...]                 # indices of the converted layers, in order
    n_layers: int                           # layers of the whole model
    context: int                            # tokens the KV cache holds
    cache_width: int                        # last axis of the KV states: context rounded up to a multiple of 32
    routing: str                            # masked | soft | sparse
    state: str                              # mlstate | explicit
    layout: str                             # bc1s | bct1
    prefill: int                            # tokens per prefill call, 0 when there is no prefill function
    weights: str                            # fp16, or the name of the compression recipe
    embed: str                              # path of the [vocab, d_model] table (runtime/embedding_table.py)
    ropes: dict[str, dict[str, Any]]
    shards: tuple[Shard, ...]
    embed_format: str = "fp16"              # fp16 | int8
    tokenizer: tuple[str, ...] = ()         # tokenizer files
    tokenizer_class: str | None = None      # of transformers; None: files copied as they were
    tokenizer_record: str | None = None     # ids that the checkpoint's gave
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    golden: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)    # what each role is stored as (compress/recipe.py)
    golden_as_stored: str | None = None     # of the same model with the compressed weights of the packages
    compression: dict[str, dict[str, Any]] = field(default_factory=dict)    # role -> formats, bytes, bits, errors
    files: dict[str, str] = field(default_factory=dict)     # sha256 of every file, packages file by file
    moe: dict[str, dict[str, Any]] = field(default_factory=dict)    # layer -> {"experts": E, "k": k}
    versions: dict[str, str] = field(default_factory=dict)
    source: dict[str, str] = field(default_factory=dict)    # digest of the checkpoint's config, and the options
    golden_key: str = ""                    # of what goldens depend on (goldens.py)
    left_out: dict[str, tuple[str, ...]] = field(default_factory=dict)  # tensors not used, by why
    format: int = FORMAT

    def shards_of(self, kind: str, layer: int | None = None) -> list[Shard]:
        """Shards of one kind (and layer), ordered by part."""
        return sorted((s for s in self.shards if s.kind == kind and s.layer == layer), key=lambda s: s.part)

    def is_stacked(self, layer: int) -> bool:
        """Whether a stack computes the layer, with others."""
        return any(layer in shard.layers for shard in self.shards)

    def write(self, folder: Path) -> None:
        """Write runtime_meta.json atomically, with sorted keys."""
        temporary = folder / f".{FILE_NAME}.tmp"
        temporary.write_text(json.dumps(asdict(self), indent=1, sort_keys=True) + "\n")
        os.replace(temporary, folder / FILE_NAME)


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder/runtime_meta.json`.

    Raises UserError when it is missing, not JSON, of another format, lacks or adds fields, or names a path outside
    the folder.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise UserError(f"{folder} is not a finished conversion", f"no {FILE_NAME}", "run `ane-moe convert` again")
    try:
        data = json.loads(path.read_text())
        if data.get("format") != FORMAT:
            raise UserError(f"{path} has an unknown format", str(data.get("format")), f"this version reads {FORMAT}")
        shards = tuple(_shard(entry) for entry in data.pop("shards"))
        manifest = Manifest(shards=shards, **{key: _frozen(value) for key, value in data.items()})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} cannot be read", f"{type(error).__name__}: {error}", "convert again") from None
    for relative in [s.path for s in manifest.shards] + [manifest.embed, *manifest.files, *manifest.tokenizer]:
        _require_inside(relative, path)
    for single in (manifest.golden, manifest.golden_as_stored, manifest.tokenizer_record):
        if single is not None:
            _require_inside(single, path)
    return manifest


def _shard(entry: dict[str, Any]) -> Shard:
    functions = tuple(ShardFunction(**function) for function in entry.pop("functions"))
    return Shard(functions=functions, **{key: _frozen(value) for key, value in entry.items()})


def _frozen(value: Any) -> Any:
    """JSON lists become tuples, also inside dictionaries (`states`)."""
    if isinstance(value, list):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    return value


def _require_inside(relative: str, manifest: Path) -> None:
    path = PurePosixPath(relative)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in relative:
        raise UserError(f"{manifest} names a file outside its folder", repr(relative), "do not trust this conversion")
