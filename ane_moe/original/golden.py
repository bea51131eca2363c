"""golden.safetensors: what the original model computes on a prompt set, for every layer.

Tokens of all prompts are laid end to end. N = tokens, d = d_model, E = experts, k = experts per
token, V = vocabulary.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ane_moe.errors import UserError
from ane_moe.files import replaced

FILE_NAME = "golden.safetensors"
FORMAT = 1
OF_THE_LAYER = ("attn_stream", "ffn_stream")  # not of its tokens
# Hidden states, and what is added to them.
OF_THE_STREAM = (
    *("x", "attn_delta", "ffn_delta", "entering", "ffn_reads", "sums"),
    *("experts_delta", "expert_outputs", "shared_output"),
)
# One key: safetensors writes several in an order that changes from run to run.
METADATA = "ane_moe_golden"

_AGAIN = "convert again with --golden, or give --checkpoint"


@dataclass(frozen=True)
class LayerGolden:
    """One layer, fp32: hidden state `x` in, and what the attention and feed-forward blocks each add
    to it, `[N,d]`.

    For a MoE layer also the full router probabilities `[N,E]` and the experts chosen, int32
    `[N,k]`. Where asked for, also what experts compute alone: their input (the normed hidden state,
    or a latent of it, of which experts then give as many channels) and what the shared expert adds,
    `[N,d]`, and for the tokens int32 `[E,P]` each expert was shown, its outputs `[E,P,d]` at a gate
    of 1; or at `expert_gate`, `[1]`, where they are not proportional to it.

    `router_scores` are what experts are chosen by, where that is not the probabilities.
    `experts_delta` is what experts and shared expert add, where the layer also changes the stream
    that they add to; in a latent what experts alone do. `entering` is what the embedding gave,
    where the model changes that before the first layer; `ffn_reads` what the feed-forward block
    reads, where that is not the stream after the attention. All `[N,E]` or `[N,d]`.

    `attn_stream` and `ffn_stream`, `[2,d]`: bias and scale of the stream where the blocks' outputs
    meet it, if it has them.

    `carried_in` and `carried_out` are what the layer takes over from the one before it and hands on
    beside the hidden state, `[N,C]` by the name of the slot (`carry.NAME`).

    `sums`, `[P]` for P prompts: the largest magnitude of a partial sum, its terms in the worst
    order, of the products that are added to hidden states. `inner`, `[P,3]`: of those that give an
    attention's values, and the linear branch of gated MLPs; and the largest number that enters the
    last matrix of such an MLP.
    """

    x: np.ndarray
    attn_delta: np.ndarray
    ffn_delta: np.ndarray
    router_probs: np.ndarray | None = None
    router_indices: np.ndarray | None = None
    ffn_input: np.ndarray | None = None
    shared_output: np.ndarray | None = None
    expert_tokens: np.ndarray | None = None
    expert_outputs: np.ndarray | None = None
    expert_gate: np.ndarray | None = None
    router_scores: np.ndarray | None = None
    experts_delta: np.ndarray | None = None
    entering: np.ndarray | None = None
    ffn_reads: np.ndarray | None = None
    attn_stream: np.ndarray | None = None
    ffn_stream: np.ndarray | None = None
    carried_in: Mapping[str, np.ndarray] = field(default_factory=dict)
    carried_out: Mapping[str, np.ndarray] = field(default_factory=dict)
    sums: np.ndarray | None = None
    inner: np.ndarray | None = None

    @property
    def middle(self) -> np.ndarray:
        """Hidden state between attention and feed-forward, `[N,d]`."""
        return self.x + self.attn_delta

    @property
    def read_by_ffn(self) -> np.ndarray:
        """What the norm before the feed-forward block reads, `[N,d]`."""
        return self.middle if self.ffn_reads is None else self.ffn_reads

    @property
    def y(self) -> np.ndarray:
        """Hidden state after the layer, `[N,d]`."""
        return self.middle + self.ffn_delta

    def with_stream(self, scale: float) -> "LayerGolden":
        """Of the same model with its hidden states times `scale`."""
        arrays = arrays_of(self)
        factors = {name: np.array(scale, np.float32) for name in OF_THE_STREAM}
        factors |= dict.fromkeys(OF_THE_LAYER, np.array([[scale], [1]], np.float32))
        scaled = {name: arrays[name] * by for name, by in factors.items() if name in arrays}
        return layer_of(arrays | scaled)


@dataclass(frozen=True)
class Golden:
    """`layers` maps indices to LayerGolden; `logits` (fp32 `[N,V]`) are the head's on the last
    captured layer's output, or on what tracks gave together (`final`, fp32 `[N,d]`).

    They are the model's logits when every layer was captured.
    """

    prompts: tuple[tuple[int, ...], ...]
    layers: Mapping[int, LayerGolden]
    logits: np.ndarray
    n_layers: int
    final: np.ndarray | None = None

    @property
    def last(self) -> np.ndarray:
        """The hidden state that the head is given, `[N,d]`."""
        return self.layers[max(self.layers)].y if self.final is None else self.final

    def with_stream(self, scale: float) -> "Golden":
        """Of the same model with its hidden states times `scale`."""
        if scale == 1:
            return self
        final = None if self.final is None else self.final * np.float32(scale)
        return replace(self, layers=_ScaledLayers(self.layers, scale), final=final)

    @property
    def complete(self) -> bool:
        return sorted(self.layers) == list(range(self.n_layers))

    @property
    def spans(self) -> list[slice]:
        """Rows of each prompt."""
        ends = np.cumsum([len(prompt) for prompt in self.prompts]).tolist()
        return [
            slice(end - len(prompt), end) for prompt, end in zip(self.prompts, ends, strict=True)
        ]


def embedded(golden: Golden) -> np.ndarray:
    """What the embedding gave for every token, fp32 `[N,d]`."""
    first = golden.layers[0]
    return first.x if first.entering is None else first.entering


def write_golden(golden: Golden, out: Path) -> None:
    """Write a golden atomically, as safetensors."""
    tensors = {
        "logits": golden.logits,
        "prompt_ids": np.concatenate(golden.prompts).astype(np.int32),
        "prompt_offsets": np.cumsum([0, *map(len, golden.prompts)]),
    }
    if golden.final is not None:
        tensors["final"] = golden.final
    for index, layer in golden.layers.items():
        tensors |= {_key(index, name): value for name, value in arrays_of(layer).items()}
    about = json.dumps(
        {"format": FORMAT, "n_layers": golden.n_layers, "layers": sorted(golden.layers)}
    )
    arrays = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    with replaced(out) as temporary:
        save_file(arrays, temporary, metadata={METADATA: about})


def read_golden(path: Path) -> Golden:
    """Open a golden; layers are read when asked for. Raises UserError when it is missing, damaged
    or incomplete."""
    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            if about.get("format") != FORMAT:
                raise UserError(
                    f"{path} is not a golden of this version",
                    f"format {about.get('format')}",
                    _AGAIN,
                )
            offsets = file.get_tensor("prompt_offsets").tolist()
            ids = file.get_tensor("prompt_ids").tolist()
            prompts = tuple(tuple(ids[a:b]) for a, b in pairwise(offsets))
            _require_shapes(file, about["layers"], sum(map(len, prompts)))
            golden = Golden(
                prompts,
                _StoredLayers(path, about["layers"]),
                file.get_tensor("logits"),
                about["n_layers"],
                file.get_tensor("final") if "final" in file.keys() else None,  # noqa: SIM118
            )
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read", f"{type(error).__name__}: {error}", _AGAIN
        ) from None
    return golden


@dataclass(frozen=True)
class _ScaledLayers(Mapping[int, LayerGolden]):
    layers: Mapping[int, LayerGolden]
    scale: float

    def __getitem__(self, index: int) -> LayerGolden:
        return self.layers[index].with_stream(self.scale)

    def __iter__(self) -> Iterator[int]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


class _StoredLayers(Mapping[int, LayerGolden]):
    """Reads one layer at a time, so that a large model's golden is never held whole."""

    def __init__(self, path: Path, indices: list[int]):
        self._path = path
        self._indices = indices

    def __getitem__(self, index: int) -> LayerGolden:
        if index not in self._indices:
            raise KeyError(index)
        with safe_open(self._path, framework="numpy") as file:
            held = {
                key.removeprefix(_key(index, ""))
                for key in file.keys()  # noqa: SIM118
                if key.startswith(_key(index, ""))
            }
            arrays = {name: file.get_tensor(_key(index, name)) for name in held}
        return layer_of(arrays)

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)


def _require_shapes(file: Any, indices: list[int], tokens: int) -> None:
    names = [
        "logits",
        *(_key(index, name) for index in indices for name in ("x", "attn_delta", "ffn_delta")),
    ]
    for name in names:
        if file.get_slice(name).get_shape()[:1] != [tokens]:
            raise ValueError(f"{name} has {file.get_slice(name).get_shape()} for {tokens} tokens")


def arrays_of(layer: LayerGolden) -> dict[str, np.ndarray]:
    """The arrays of a layer by name; those of `carried_in` and `carried_out` by both names."""
    flat: dict[str, np.ndarray] = {}
    for name, value in vars(layer).items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{slot}": array for slot, array in value.items()}
        elif value is not None:
            flat[name] = value
    return flat


def layer_of(arrays: Mapping[str, np.ndarray]) -> LayerGolden:
    """The layer whose `arrays_of` are given."""
    fields: dict[str, Any] = {}
    for name, value in arrays.items():
        outer, _, inner = name.partition(".")
        if inner:
            fields.setdefault(outer, {})[inner] = value
        else:
            fields[outer] = value
    return LayerGolden(**fields)


def _key(layer: int, name: str) -> str:
    return f"layer_{layer:03d}.{name}"
