"""A GGUF file's tensors as transformers' checkpoints have them."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ane_moe.checkpoints.coded import Turned
from ane_moe.checkpoints.expert_stack import unstacked
from ane_moe.checkpoints.gguf.architectures import TOP, Architecture, Stacks
from ane_moe.checkpoints.gguf.blocks import HalfSplit, Joined
from ane_moe.checkpoints.gguf.config import head_of
from ane_moe.checkpoints.gguf.header import plain_rows
from ane_moe.checkpoints.stored_tensor import StoredTensor
from ane_moe.errors import UserError

OF_LAYER = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")
FUSED = "ffn_gate_up_exps"
STACK = re.compile(r"ffn_(gate|up|down)_exps")
ROTATED = ("attn_q", "attn_k")
# Vectors there, matrices of one row, or of one channel, in transformers.
ONE_ROW, ONE_CHANNEL = "ffn_gate_inp_shexp", "shortconv.conv"
BARE = ("exp_probs_b", "attn_sinks")  # without `weight` or `bias` in their names in transformers


def native_tensors(
    known: Architecture, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """The tensors by transformers' names; unknown ones keep theirs."""
    native: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        for own, made in _native(known, config, name, tensors):
            if own in native:
                raise UserError(f"{tensor.path} stores {own} twice", name, "download it again")
            native[own] = made
    return native


def _native(
    known: Architecture, config: Mapping[str, Any], name: str, tensors: Mapping[str, StoredTensor]
) -> Iterator[tuple[str, StoredTensor]]:
    tensor, found = tensors[name], OF_LAYER.fullmatch(name)
    if found is None:
        stem, _, kind = name.rpartition(".")
        top = {**TOP, **known.top}
        yield (f"{top[stem]}.{kind}" if stem in top else name), tensor
        return
    layer, stem, kind = found.groups()
    start = f"model.layers.{layer}"
    stack = STACK.fullmatch(stem)
    if stack and known.stacks is not None:
        yield from _stacked(known.stacks, start, stack[1], name, tensors)
    elif stack and kind == "weight" and len(tensor.shape) == 3:
        yield from unstacked(tensor, f"{start}.{known.experts}", stack[1]).items()
    elif stem == FUSED and kind == "weight":
        stacks = known.stacks or Stacks(f"{known.experts}.experts.gate_up_proj", "")
        yield f"{start}.{stacks.gate_up}", tensor
    elif stem in known.names:
        own = known.names[stem] if stem in BARE else f"{known.names[stem]}.{kind}"
        rotated = known.neighbours and stem in ROTATED
        yield f"{start}.{own}", _half_split(tensor, config) if rotated else _shaped(stem, tensor)
    elif isinstance(last := config.get("num_hidden_layers"), int) and int(layer) >= last:
        yield f"{start}.{stem}.{kind}", tensor  # of what predicts further tokens
    else:
        yield name, tensor


def _stacked(
    stacks: Stacks, start: str, matrix: str, name: str, tensors: Mapping[str, StoredTensor]
) -> Iterator[tuple[str, StoredTensor]]:
    """One stack of a layer's experts, under the name of the first matrix that is in it."""
    if matrix == "up":  # with gate
        return
    bias = name.endswith(".bias")
    own = f"{start}.{stacks.down if matrix == 'down' else stacks.gate_up}" + "_bias" * bias
    tensor = tensors[name] if matrix == "down" else _joined(name, tensors, stacks.turned)
    yield own, _turned(tensor) if stacks.turned and not bias else tensor


def _joined(name: str, tensors: Mapping[str, StoredTensor], alternating: bool) -> StoredTensor:
    """The stack of an expert's gate and up, one below the other, or row by row in turn."""
    gate, up = tensors[name], tensors.get(name.replace("gate", "up"))
    bias = name.endswith(".bias")
    plain = not bias or (gate.codec is None and up is not None and up.codec is None)
    if up is None or up.shape != gate.shape or len(gate.shape) != 3 - bias or not plain:
        raise UserError(
            f"{gate.path}: {name} has no counterpart of its shape",
            str(up and list(up.shape)),
            "download it again",
        )
    experts, rows = gate.shape[:2]
    rest = gate.shape[2:]
    alike = (replace(each, shape=(experts, rows, *(rest or (1,)))) for each in (gate, up))
    upper, lower = (plain_rows(each).codec for each in alike)
    codec = upper and lower and Joined(upper, lower, 1 if alternating else rows)
    return replace(plain_rows(gate), shape=(experts, 2 * rows, *rest), codec=codec)


def _turned(tensor: StoredTensor) -> StoredTensor:
    """A stack of matrices whose inputs come first; others as they are."""
    plain = plain_rows(tensor)
    if len(tensor.shape) != 3 or plain.codec is None:
        return tensor
    experts, rows, columns = tensor.shape
    return replace(plain, shape=(experts, columns, rows), codec=Turned(plain.codec, rows))


def _half_split(tensor: StoredTensor, config: Mapping[str, Any]) -> StoredTensor:
    head, rows = head_of(config) or 0, tensor.shape[0]
    vector = len(tensor.shape) == 1
    if head < 2 or head % 2 or rows % head or (vector and tensor.codec is not None):
        raise UserError(
            f"{tensor.path}: {tensor.key} holds no whole heads of pairs",
            f"{rows} rows, and heads of {head}",
            "download it again",
        )
    plain = plain_rows(replace(tensor, shape=(rows, 1)) if vector else tensor)
    codec = plain.codec and HalfSplit(plain.codec, head)
    return replace(plain, shape=tensor.shape, codec=codec)


def _shaped(stem: str, tensor: StoredTensor) -> StoredTensor:
    shape = tensor.shape
    if stem == ONE_ROW and len(shape) == 1:
        return replace(tensor, shape=(1, *shape))
    if stem == ONE_CHANNEL and len(shape) == 2:
        return replace(tensor, shape=(shape[0], 1, shape[1]))
    return tensor
