"""GPTQ's and AWQ's 2 to 8 bits: inputs before outputs, a zero point and a scale for each run of
inputs and each output.

Source: AutoGPTQ's and AutoAWQ's `dequantize_gemm`; GPTQModel for GPTQ's second form, in which zero
points are stored as they are, and not less one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ane_moe.checkpoints.coded import real_numbers, stored_numbers, unpacked
from ane_moe.checkpoints.packed.group import Group, groups
from ane_moe.checkpoints.stored_tensor import Pieces, StoredTensor

NAME = "GPTQ or AWQ"
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where the eight of a word are


@dataclass(frozen=True)
class InputsFirst:
    """A matrix `(outputs, inputs)`, decoded whole."""

    words: StoredTensor
    zeros: StoredTensor
    scales: StoredTensor
    bits: int
    outputs: int
    inputs: int
    awq: bool
    less: int  # by which stored zero points are too small
    order: StoredTensor | None = None  # which run each input is of
    shuffled: bool = False  # whether runs may be of inputs that are not neighbours

    @property
    def columns(self) -> int:
        return self.inputs

    @property
    def together(self) -> int:
        return self.outputs

    def rows(self, first: int, last: int) -> np.ndarray:
        numbers = (self.of("codes") - self.of("zeros")) * self.of("scales")
        return np.ascontiguousarray(numbers.T)

    @property
    def pieces(self) -> Pieces:
        codes, zeros, scales = (Piece(self, name) for name in ("codes", "zeros", "scales"))
        runs = self.scales.shape[0]
        width = 1 if self.shuffled else 0 if runs == 1 else self.inputs // runs
        values = tuple(map(float, range(1 << self.bits)))
        return Pieces(codes, values, 1, width, scales, zeros)

    def of(self, piece: str) -> np.ndarray:
        """Codes, zero points or scales of all elements, fp32 `(inputs, outputs)`."""
        if piece == "codes":
            return self._codes().astype(np.float32)
        if piece == "zeros":
            words = stored_numbers(self.zeros).reshape(self.zeros.shape)
            zeros = self._in_order(unpacked(words.view(np.uint8), self.bits, self.outputs))
            by_run = zeros.astype(np.float32) + np.float32(self.less)
        else:
            by_run = real_numbers(self.scales).reshape(self.scales.shape)
        if self.order is None:
            return by_run[np.arange(self.inputs) // (self.inputs // len(by_run))]
        return by_run[stored_numbers(self.order)]

    def _codes(self) -> np.ndarray:
        words = stored_numbers(self.words).reshape(self.words.shape)
        if self.awq:
            return self._in_order(unpacked(words.view(np.uint8), self.bits, self.outputs))
        by_output = np.ascontiguousarray(words.T).view(np.uint8)
        return unpacked(by_output, self.bits, self.inputs).T

    def _in_order(self, codes: np.ndarray) -> np.ndarray:
        if not self.awq:
            return codes
        return codes.reshape(len(codes), -1, 8)[:, :, AWQ_ORDER].reshape(len(codes), -1)


@dataclass(frozen=True)
class Piece:
    """Codes, zero points or scales of a matrix."""

    matrix: InputsFirst
    name: str
    pieces: None = None

    @property
    def columns(self) -> int:
        return self.matrix.columns

    @property
    def together(self) -> int:
        return self.matrix.together

    def rows(self, first: int, last: int) -> np.ndarray:
        return np.ascontiguousarray(self.matrix.of(self.name).T)


def plain(
    facts: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> Iterator[tuple[tuple[str, ...], dict[str, StoredTensor]]]:
    for group in groups(tensors, "qweight", "g_idx", needed=("qzeros", "scales")):
        yield group.names, _plain(group, facts)


def _plain(group: Group, facts: Mapping[str, Any]) -> dict[str, StoredTensor]:
    words, zeros, scales = group["qweight"], group["qzeros"], group["scales"]
    bits = facts.get("bits", facts.get("w_bit", 4))
    fits = isinstance(bits, int) and bits in (2, 3, 4, 8) and words.dtype == zeros.dtype == "I32"
    group.require(fits and len(words.shape) == len(scales.shape) == 2, f"no matrix of {bits} bits")
    runs, outputs = scales.shape
    awq = facts.get("quant_method") == "awq"
    inputs = words.shape[0] if awq else words.shape[0] * 32 // bits
    order = None if awq else group.get("g_idx")
    needed = (inputs, outputs * bits // 32) if awq else (inputs * bits // 32, outputs)
    group.require(words.shape == needed, "qweight does not fit the scales")
    group.require(zeros.shape == (runs, outputs * bits // 32), "qzeros do not fit the scales")
    size = facts.get("group_size", facts.get("q_group_size", -1))
    whole = inputs == runs * size if isinstance(size, int) and size > 0 else runs == 1
    group.require(order is not None or whole, f"no runs of {size} inputs")
    group.require(order is None or order.shape == (inputs,), "g_idx does not fit the inputs")
    group.require(not awq or bits == 4, "AWQ of other than 4 bits")
    first_form = not awq and facts.get("checkpoint_format") != "gptq_v2"
    shuffled = order is not None and facts.get("desc_act") is not False
    codec = InputsFirst(
        words, zeros, scales, bits, outputs, inputs, awq, int(first_form), order, shuffled
    )
    return group.plain("weight", codec, (outputs, inputs))
