"""A LoRA adapter beside a model: a folder as PEFT writes it, with adapter_config.json and
adapter_model.safetensors.

An adapter adds `scale * B A` to matrices, A `(r, columns)` and B `(rows, r)`, scale being alpha / r
or, with rslora, alpha / sqrt(r). For a stack of E experts A lies expert by expert, `(E r,
columns)`, and in B, `(rows, r E)`, the columns of all experts lie next to each other, rank by rank.
Whether a model stores a matrix turned (`fan_in_fan_out`) its own form tells, as it does in PEFT.

Source: peft 0.21 (`LoraLayer`, `ParamWrapper.get_delta_weight`, `get_pattern_key`).
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ane_moe.checkpoints.checkpoint import Checkpoint, Hasher, TensorSource
from ane_moe.checkpoints.coded import real_numbers
from ane_moe.checkpoints.folder import ADAPTER
from ane_moe.checkpoints.safetensors_header import read_header
from ane_moe.checkpoints.stored_tensor import StoredTensor
from ane_moe.errors import UserError
from ane_moe.half import STORED, narrowed
from ane_moe.json_file import read_json
from ane_moe.wording import counted, listed

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
INTO, OUT = ".lora_A.weight", ".lora_B.weight"
INNER = ".base_layer"  # of a module whose several parameters are adapted
AGAIN = "give the adapter as peft's save_pretrained wrote it"
MERGE = "merge it with peft (merge_and_unload, then save_pretrained), and give that model"
MERGED_INSTEAD = "give --adapter-mode merge"
# Fields that, when set, ask for more than B A.
VARIANTS = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "layer_replication",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "velora_config",
    "monteclora_config",
    "arrow_config",
    "kasa_config",
)
# Ways to begin that also change the weights of the model.
CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Pair:
    """The two thin matrices of one module as they are stored."""

    into: StoredTensor
    out: StoredTensor


@dataclass(frozen=True)
class LowRank:
    """`out @ into`, what an adapter adds to one of our matrices. `place` says which rows of the
    adapter's target that matrix is, and which expert of a stack."""

    pair: Pair
    place: TensorSource
    scale: float
    rank: int

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """`out` (rows, r), times the scale, and `into` (r, columns); fp32."""
        into, out, place = _numbers(self.pair.into), _numbers(self.pair.out), self.place
        if place.index is not None:
            into = into.reshape(-1, self.rank, into.shape[1])[place.index]
            out = out.reshape(len(out), self.rank, -1)[:, :, place.index]
        across = place.columns if place.transpose else place.rows
        chosen = out[slice(*across)] if across else out
        thin = replace(_straight(place), stored_shape=chosen.shape)
        rows = thin.arranged(np.ascontiguousarray(chosen)).reshape(thin.shape)
        return rows * np.float32(self.scale), np.ascontiguousarray(into)

    def stored(self, scale: float) -> tuple[np.ndarray, np.ndarray]:
        """The factors, `out` times `scale`, as fp16 holds them best: a power of two goes from one
        to the other, so that both reach equally far."""
        out, into = self.factors()
        out = out * np.float32(scale)
        ends = [max(float(np.abs(one).max(initial=0)), 1e-30) for one in (out, into)]
        shift = round(math.log2(ends[1] / ends[0]) / 2)
        halves = narrowed(np.ldexp(out, shift)), narrowed(np.ldexp(into, -shift))
        if not all(np.isfinite(half).all() for half in halves):
            raise UserError(
                f"{self.pair.into.path}: {self.pair.into.key} overflows fp16, or is damaged",
                do="merge it: " + MERGED_INSTEAD,
            )
        return halves

    def feed(self, hasher: Hasher) -> None:
        """Feed `hasher` what tells this from other matrices."""
        for factor in self.factors():
            hasher.update(np.ascontiguousarray(factor).data)


@dataclass(frozen=True)
class Added:
    """What is added to the region of a stored tensor that one of our matrices lies in."""

    source: TensorSource
    low_rank: LowRank

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """(rows, r) and (r, columns) whose product is in the order of the region."""
        (out, into), source = self.low_rank.factors(), self.source
        rank = out.shape[1]
        if source.transpose:
            turned = np.zeros((source.region_shape[1], rank), np.float32)
            turned[slice(*source.columns) if source.columns else slice(None)] = out
            return into.T, turned.T
        straight = np.zeros((source.region_shape[0], rank), np.float32)
        view = replace(_straight(source), stored_shape=straight.shape).arranged(straight)
        view[...] = out.reshape(view.shape)
        return straight, into


@dataclass(frozen=True)
class Merged:
    """The numbers of a stored tensor with what adapters add to it, in fp32."""

    base: StoredTensor
    added: tuple[Added, ...]
    pieces: None = None

    @property
    def columns(self) -> int:
        return self.base.shape[-1]

    @property
    def together(self) -> int:
        return self.base.codec.together if self.base.codec else 1

    def rows(self, first: int, last: int) -> np.ndarray:
        """Rows [first, last), fp32, `(last - first, columns)`."""
        merged = self._base(first, last)
        for added in self.added:
            start, count = (size // self.columns for size in added.source.region)
            begin, end = max(first, start), min(last, start + count)
            if begin < end:
                out, into = added.factors()
                merged[begin - first : end - first] += out[begin - start : end - start] @ into
        return merged

    def _base(self, first: int, last: int) -> np.ndarray:
        base, count = self.base, (last - first) * self.columns
        if base.codec is None:
            numbers = real_numbers(base, first * self.columns, count)
        else:
            numbers = base.codec.rows(first, last)
        return numbers.reshape(last - first, -1) * np.float32(base.scale)


@dataclass(frozen=True)
class Adapter:
    """An open adapter: its thin matrices by module as transformers calls it, innermost last, and
    `saved` tensors that take the place of a model's."""

    folder: Path
    config: Mapping[str, Any]
    pairs: Mapping[str, tuple[Pair, ...]]
    saved: Mapping[str, StoredTensor] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Numbers that it adds."""
        pairs = (pair for own in self.pairs.values() for pair in own)
        return sum(math.prod(one.shape) for pair in pairs for one in (pair.into, pair.out))

    def find(self, place: TensorSource) -> LowRank | None:
        """What it adds to the matrix that lies at `place` of transformers' model."""
        stacked = place.index is not None
        whole = place.stored_shape[1:] if stacked else place.stored_shape
        module = place.key.removesuffix(".weight")
        owners = (module, module.rpartition(".")[0]) if stacked else (module,)
        rows, columns = whole[::-1] if place.transpose else whole
        experts = place.stored_shape[0] if stacked else 1
        for pair in (pair for owner in owners for pair in self.pairs.get(owner, ())):
            if (pair.out.shape[0], pair.into.shape[1]) == (rows, columns):
                rank = pair.into.shape[0] // experts
                target = place.key if stacked else module
                return LowRank(pair, place, self._scale(target, pair, rank, experts), rank)
        return None

    def _scale(self, target: str, pair: Pair, rank: int, experts: int) -> float:
        said = self._of("rank_pattern", target, self.config.get("r"))
        if said != rank or rank * experts != pair.into.shape[0]:
            found = f"{list(pair.into.shape)} for {counted(experts, 'matrix')}, rank {said}"
            raise UserError(f"{self.folder}: {pair.into.key} does not fit {ADAPTER}", found, AGAIN)
        alpha = self._of("alpha_pattern", target, self.config.get("lora_alpha"))
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise UserError(f"{self.folder / ADAPTER}: lora_alpha is no number", repr(alpha))
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _of(self, pattern: str, target: str, usual: Any) -> Any:
        """What the configuration says of a module: by the first pattern that it ends with."""
        patterns = self.config.get(pattern) or {}
        try:
            return next(
                (said for key, said in patterns.items() if re.match(rf"(.*\.)?({key})$", target)),
                usual,
            )
        except (re.error, AttributeError):
            where = f"{self.folder / ADAPTER}: {pattern} cannot be read"
            raise UserError(where, str(patterns)[:100]) from None


def adapter_name(folder: str | Path) -> str:
    """What an adapter is called: as its folder, as an identifier."""
    return re.sub(r"\W", "_", Path(folder).resolve().name)


def named(adapters: Sequence[Adapter]) -> dict[str, Adapter]:
    """Adapters by their names. Raises UserError where two have one."""
    by_name: dict[str, Adapter] = {}
    for adapter in adapters:
        name = adapter_name(adapter.folder)
        if name in by_name:
            folders = f"{by_name[name].folder} and {adapter.folder}"
            raise UserError(f"two adapters are called {name}", folders, "rename a folder")
        by_name[name] = adapter
    return by_name


def open_adapter(folder: Path) -> Adapter:
    """Read the configuration and the header of an adapter; no weights yet. Raises UserError for
    what is no LoRA adapter, or one that does more than add B A."""
    if not (folder / ADAPTER).is_file() or not (folder / WEIGHTS).is_file():
        lacks = ADAPTER if not (folder / ADAPTER).is_file() else WEIGHTS
        raise UserError(
            f"{folder} is not an adapter",
            f"no {lacks}",
            f"give a folder of peft's, with {ADAPTER} and {WEIGHTS}",
        )
    config = read_json(folder / ADAPTER)
    _require_plain(config, folder)
    tensors = read_header(folder / WEIGHTS)
    named = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    return Adapter(folder, config, _pairs(named, folder), _saved(named))


def _require_plain(config: Mapping[str, Any], folder: Path) -> None:
    where = f"{folder / ADAPTER} cannot be applied"
    if config.get("peft_type") != "LORA":
        raise UserError(where, f"peft_type {config.get('peft_type')!r}", f"only LORA is; {MERGE}")
    asked = [name for name in VARIANTS if config.get(name)]
    if config.get("bias", "none") != "none":
        asked.append("bias")
    if str(config.get("init_lora_weights")).startswith(CHANGING):
        asked.append("init_lora_weights")
    if asked:
        said = ", ".join(f"{name} {config[name]!r}" for name in asked)
        raise UserError(where, said[:200], MERGE)


def _pairs(named: Mapping[str, StoredTensor], folder: Path) -> dict[str, tuple[Pair, ...]]:
    """The thin matrices by module."""
    found: dict[str, dict[str, Pair]] = {}
    stems = sorted({key.removesuffix(INTO).removesuffix(OUT) for key in named if ".lora_" in key})
    for stem in stems:
        into, out = named.get(stem + INTO), named.get(stem + OUT)
        if into is None or out is None:
            raise UserError(
                f"{folder} holds a matrix without the other one", stem[:200], f"{AGAIN}, or {MERGE}"
            )
        _require_thin(into, out, folder)
        module = re.sub(rf"({re.escape(INNER)})+$", "", stem)
        found.setdefault(module, {})[stem] = Pair(into, out)
    return {module: tuple(pairs.values()) for module, pairs in found.items()}


def _require_thin(into: StoredTensor, out: StoredTensor, folder: Path) -> None:
    flat = len(into.shape) == len(out.shape) == 2
    if not flat or into.shape[0] != out.shape[1] or not into.shape[0]:
        found = f"{list(into.shape)} and {list(out.shape)}"
        raise UserError(f"{folder}: {into.key} and lora_B are no pair", found, AGAIN)
    if unread := {into.dtype, out.dtype} - STORED.keys():
        do = f"supported: {', '.join(STORED)}"
        raise UserError(f"{folder}: {into.key} cannot be read", ", ".join(unread), do)


def _saved(named: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Whole tensors: of modules that were trained, or of heads that are adapted."""
    return {
        key.replace(f"{INNER}.", "."): tensor
        for key, tensor in named.items()
        if ".lora_" not in key
    }


def require_used(adapter: Adapter, used: Collection[Pair]) -> None:
    """Raise UserError where some of the adapter's matrices found no place in the model."""
    idle = [
        module for module, pairs in adapter.pairs.items() if any(one not in used for one in pairs)
    ]
    if idle:
        raise UserError(
            f"{adapter.folder} adapts {counted(len(idle), 'module')} that the model does not have "
            "in that form",
            listed(idle),
            f"give the adapter of this very model; if it is, {MERGE}",
        )


def merged(checkpoint: Checkpoint, adapter: Adapter, added: Collection[Added]) -> Checkpoint:
    """The checkpoint with what is `added` to its tensors, and those that the adapter has `saved` in
    the place of its own. Raises UserError for one that it lacks."""
    tensors = dict(checkpoint.tensors)
    for name, tensor in adapter.saved.items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            its_own = list(tensors[name].shape) if name in tensors else "no such tensor"
            raise UserError(
                f"{adapter.folder} has {name} of its own, which cannot take the model's place",
                f"{list(tensor.shape)} for {its_own}",
                MERGE,
            )
        tensors[name] = tensor
    by_key: dict[str, list[Added]] = {}
    for one in added:
        by_key.setdefault(one.source.key, []).append(one)
    for key, own in by_key.items():
        codec = Merged(tensors[key], tuple(own))
        tensors[key] = replace(tensors[key], dtype="F32", scale=1.0, made=True, codec=codec)
    count = len({one.low_rank.pair for one in added}) + len(adapter.saved)
    note = f"the adapter {adapter.folder} is merged: {counted(count, 'module')} of the model"
    return replace(checkpoint, tensors=tensors, notes=(*checkpoint.notes, note))


def _straight(source: TensorSource) -> TensorSource:
    """How rows are arranged, once those that are meant are chosen."""
    return replace(source, index=None, rows=None, columns=None, transpose=False)


@lru_cache(8)
def _numbers(tensor: StoredTensor) -> np.ndarray:
    """A thin matrix, fp32. Those of experts are asked for once for each."""
    return real_numbers(tensor).reshape(tensor.shape)
