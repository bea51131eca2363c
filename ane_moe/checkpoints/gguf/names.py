"""A GGUF file's tensors as transformers' checkpoints have them."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ane_moe.checkpoints.expert_stack import unstacked
from ane_moe.checkpoints.gguf.architectures import TOP, Architecture
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
BARE = "exp_probs_b"  # a bias there, without `bias` in its name in transformers


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
    if stack and kind == "weight" and len(tensor.shape) == 3:
        if known.stacks is None:
            yield from unstacked(tensor, f"{start}.{known.experts}", stack[1]).items()
        elif stack[1] == "down":
            yield f"{start}.{known.stacks[1]}", tensor
        elif stack[1] == "gate":
            yield f"{start}.{known.stacks[0]}", _joined(name, tensors)
    elif stem == FUSED and kind == "weight":
        fused = known.stacks[0] if known.stacks else f"{known.experts}.experts.gate_up_proj"
        yield f"{start}.{fused}", tensor
    elif stem in known.names:
        own = known.names[stem] if stem == BARE else f"{known.names[stem]}.{kind}"
        rotated = known.neighbours and stem in ROTATED
        yield f"{start}.{own}", _half_split(tensor, config) if rotated else _shaped(stem, tensor)
    else:
        yield name, tensor


def _joined(name: str, tensors: Mapping[str, StoredTensor]) -> StoredTensor:
    """The stack of an expert's gate and up, one below the other."""
    gate, up = tensors[name], tensors.get(name.replace("gate", "up"))
    if up is None or up.shape != gate.shape:
        raise UserError(
            f"{gate.path}: {name} has no counterpart of its shape",
            str(up and list(up.shape)),
            "download it again",
        )
    experts, rows, columns = gate.shape
    codecs = [plain_rows(tensor).codec for tensor in (gate, up)]
    codec = codecs[0] and codecs[1] and Joined(codecs[0], codecs[1], rows)
    return replace(plain_rows(gate), shape=(experts, 2 * rows, columns), codec=codec)


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
