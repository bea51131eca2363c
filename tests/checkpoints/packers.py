"""Quantised forms of a plain matrix, made by the libraries that write such files, or after their
description; each with the numbers that the same library decodes, in fp32.

A packer takes a matrix `(rows, columns)` of fp32 and gives its tensors by the ends of their names,
and the numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.mx_utils import decompress_mx_scale
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.metal_quantization import (
    _affine_dequantize_tensor,
    _affine_quantize_tensor,
)

Packed = tuple[dict[str, Tensor], Tensor]
E4M3_MAX = 448.0


@dataclass(frozen=True)
class PackedForm:
    """`config` is what config.json says of it."""

    config: dict[str, Any]
    pack: Callable[[Tensor], Packed]


def fp8_blocks(weight: Tensor, size: int = 16) -> Packed:
    """DeepSeek's form; rows and columns have to be multiples of `size`."""
    rows, columns = weight.shape
    blocks = weight.reshape(rows // size, size, columns // size, size)
    scales = blocks.abs().amax((1, 3)) / E4M3_MAX
    codes = (blocks / scales[:, None, :, None]).reshape(rows, columns).to(torch.float8_e4m3fn)
    numbers = Fp8Dequantize(None)._dequantize_one(codes, scales)
    return {"weight": codes, "weight_scale_inv": scales}, numbers


def fp8_rows(weight: Tensor) -> Packed:
    """One scale for each row, bf16, as compressed-tensors writes them."""
    scales = (weight.abs().amax(1, keepdim=True) / E4M3_MAX).bfloat16()
    codes = (weight / scales.float()).to(torch.float8_e4m3fn)
    numbers = Fp8Dequantize(None)._dequantize_one(codes, scales.float())
    return {"weight": codes, "weight_scale": scales}, numbers


def fp8_whole(weight: Tensor) -> Packed:
    """One scale for all, as ModelOpt writes them."""
    scale = weight.abs().amax() / E4M3_MAX
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def whole_numbers(bits: int, symmetric: bool, group: int | None) -> Callable[[Tensor], Packed]:
    """compressed-tensors' pack-quantized."""

    def pack(weight: Tensor) -> Packed:
        strategy = "group" if group else "channel"
        args = QuantizationArgs(
            num_bits=bits, type="int", symmetric=symmetric, strategy=strategy, group_size=group
        )
        low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        runs = weight.reshape(len(weight), -1, group or weight.shape[1])
        if symmetric:
            scale = runs.abs().amax(2) / high
            zero = torch.zeros_like(scale).to(torch.int8)
        else:
            least, most = runs.amin(2).clamp(max=0), runs.amax(2).clamp(min=0)
            scale = (most - least) / (high - low)
            zero = (low - least / scale).round().clamp(low, high).to(torch.int8)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        own = BaseCompressor.get_value_from_registry("pack-quantized")
        plain = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        tensors = own.compress(plain, scheme)
        return tensors, own.decompress(tensors, scheme)["weight"].float()

    return pack


def signed_bytes(weight: Tensor) -> Packed:
    """compressed-tensors' int-quantized: int8, a scale for each row."""
    args = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    own = BaseCompressor.get_value_from_registry("int-quantized")
    scale = weight.abs().amax(1, keepdim=True) / 127
    tensors = own.compress({"weight": weight, "weight_scale": scale}, scheme)
    return tensors, own.decompress(tensors, scheme)["weight"].float()


def nvfp4(weight: Tensor) -> Packed:
    """compressed-tensors' NVFP4: E2M1 in runs of 16, E4M3 for each, one fp32 for all."""
    args = QuantizationArgs(
        num_bits=4, type="float", symmetric=True, strategy="tensor_group", group_size=16
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    own = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    most = weight.reshape(len(weight), -1, 16).abs().amax(2)
    total = (E4M3_MAX * 6.0 / weight.abs().amax()).reshape(1)
    scale = (most / 6.0 * total).to(torch.float8_e4m3fn).float()
    plain = {"weight": weight, "weight_scale": scale, "weight_global_scale": total}
    tensors = own.compress(plain, scheme)
    codes = Fp8Dequantize(None)._unpack_fp4(tensors["weight_packed"])
    # `decompress` itself works in bf16.
    numbers = dequantize(
        codes, tensors["weight_scale"].float(), args=args, dtype=torch.float32, global_scale=total
    )
    return tensors, numbers


def modelopt_nvfp4(weight: Tensor) -> Packed:
    """The same codes as ModelOpt names them: the one fp32 multiplies."""
    tensors, _ = nvfp4(weight)
    scale, total = tensors["weight_scale"], 1 / tensors["weight_global_scale"]
    renamed = {"weight": tensors["weight_packed"], "weight_scale": scale, "weight_scale_2": total}
    codes = Fp8Dequantize(None)._unpack_fp4(tensors["weight_packed"])
    runs = codes.reshape(len(codes), -1, 16) * (scale.float() * total)[:, :, None]
    return renamed, runs.reshape(codes.shape)


def mxfp4_rows(weight: Tensor) -> Packed:
    """compressed-tensors' MXFP4."""
    args = QuantizationArgs(
        num_bits=4, type="float", symmetric=True, strategy="group", group_size=32
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    own = BaseCompressor.get_value_from_registry("mxfp4-pack-quantized")
    most = weight.reshape(len(weight), -1, 32).abs().amax(2)
    scale = 2.0 ** (most.log2().floor() - 2)
    tensors = own.compress({"weight": weight, "weight_scale": scale}, scheme)
    codes = Fp8Dequantize(None)._unpack_fp4(tensors["weight_packed"])
    exponents = decompress_mx_scale(tensors["weight_scale"]).float()
    runs = codes.reshape(len(codes), -1, 32) * exponents[:, :, None]
    return tensors, runs.reshape(codes.shape)


def mlx_affine(bits: int, group: int = 32) -> Callable[[Tensor], Packed]:
    """MLX's affine form of 2, 4 or 8 bits, by transformers."""

    def pack(weight: Tensor) -> Packed:
        codes, scales, offsets = _affine_quantize_tensor(weight, group, bits)
        numbers = _affine_dequantize_tensor(codes, scales, offsets, group, bits)
        return {"weight": codes, "scales": scales, "biases": offsets}, numbers

    return pack


def _words(codes: Tensor, bits: int) -> Tensor:
    """Codes `(n, m)` as int32 `(n * bits / 32, m)`: AutoGPTQ's `pack`, without its loops of
    cases."""
    single = (codes.long()[:, None, :] >> torch.arange(bits)[None, :, None]) & 1
    stream = single.reshape(-1, 32, codes.shape[1])  # bits of a word, lowest first
    words = (stream << torch.arange(32)[None, :, None]).sum(1)
    return (words - (words >= 1 << 31).long() * (1 << 32)).to(torch.int32)


def gptq(bits: int, group: int, shuffled: bool = False, second: bool = False) -> Any:
    """AutoGPTQ's form; `shuffled`: which run an input belongs to is said (`desc_act`)."""

    def pack(weight: Tensor) -> Packed:
        turned = weight.T.contiguous()  # (inputs, outputs)
        runs = torch.arange(len(turned)) // group
        if shuffled:
            runs = runs[torch.randperm(len(runs), generator=torch.Generator().manual_seed(1))]
        scales, zeros = [], []
        for run in range(int(runs.max()) + 1):
            own = turned[runs == run]
            least, most = own.amin(0), own.amax(0)
            scales.append(((most - least) / ((1 << bits) - 1)).half())
            zeros.append((-least / scales[-1].float()).round().clamp(1, (1 << bits) - 1))
        scale, zero = torch.stack(scales), torch.stack(zeros)
        codes = (turned / scale.float()[runs] + zero[runs]).round().clamp(0, (1 << bits) - 1)
        numbers = ((codes - zero[runs]) * scale.float()[runs]).T
        stored = zero if second else zero - 1
        tensors = {
            "qweight": _words(codes, bits),
            "qzeros": _words(stored.T.contiguous(), bits).T.contiguous(),
            "scales": scale,
            "g_idx": runs.to(torch.int32),
        }
        return tensors, numbers

    return pack


def awq(weight: Tensor, group: int = 32) -> Packed:
    """AutoAWQ's GEMM form: codes laid as its kernels want them, decoded by compressed-tensors."""
    turned = weight.T.contiguous()
    runs = turned.reshape(-1, group, turned.shape[1])
    least, most = runs.amin(1), runs.amax(1)
    scales = ((most - least) / 15).half()
    zeros = (-least / scales.float()).round().clamp(0, 15)
    spread = torch.arange(len(turned)) // group
    codes = (turned / scales.float()[spread] + zeros[spread]).round().clamp(0, 15)

    def laid(values: Tensor) -> Tensor:
        ordered = values.reshape(len(values), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]
        return _words(ordered.reshape(len(values), -1).T.contiguous(), 4).T.contiguous()

    tensors = {"qweight": laid(codes), "qzeros": laid(zeros), "scales": scales}
    converter = AutoAWQConverter(group_size=group)
    named = {f"layer.{name}": tensor for name, tensor in tensors.items()}
    packed = {name.removeprefix("layer."): t for name, t in converter.process(named).items()}
    packed["weight_scale"] = packed["weight_scale"].float()
    scheme = next(iter(converter._build_quant_config().config_groups.values()))
    own = BaseCompressor.get_value_from_registry("pack-quantized")
    return tensors, own.decompress(packed, scheme)["weight"].float()


def _named(method: str, **facts: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": method, **facts}}


COMPRESSED = _named("compressed-tensors")
PACKERS = {
    "fp8 blocks": PackedForm(_named("fp8", weight_block_size=[16, 16]), fp8_blocks),
    "fp8 rows": PackedForm(COMPRESSED, fp8_rows),
    "fp8 whole": PackedForm(_named("modelopt", quant_algo="FP8"), fp8_whole),
    "4 bit in runs": PackedForm(COMPRESSED, whole_numbers(4, True, 32)),
    "4 bit with zero points": PackedForm(COMPRESSED, whole_numbers(4, False, 32)),
    "4 bit by row": PackedForm(COMPRESSED, whole_numbers(4, True, None)),
    "3 bit in runs": PackedForm(COMPRESSED, whole_numbers(3, False, 16)),
    "8 bit in runs": PackedForm(COMPRESSED, whole_numbers(8, True, 32)),
    "int8": PackedForm(COMPRESSED, signed_bytes),
    "nvfp4": PackedForm(COMPRESSED, nvfp4),
    "nvfp4 of ModelOpt": PackedForm(_named("modelopt", quant_algo="NVFP4"), modelopt_nvfp4),
    "mxfp4 in rows": PackedForm(COMPRESSED, mxfp4_rows),
    "mlx 2 bit": PackedForm({"quantization": {"bits": 2, "group_size": 32}}, mlx_affine(2)),
    "mlx 4 bit": PackedForm({"quantization": {"bits": 4, "group_size": 32}}, mlx_affine(4)),
    "mlx 8 bit": PackedForm({"quantization": {"bits": 8, "group_size": 32}}, mlx_affine(8)),
    "gptq 4 bit": PackedForm(_named("gptq", bits=4, group_size=32), gptq(4, 32)),
    "gptq 3 bit": PackedForm(_named("gptq", bits=3, group_size=32), gptq(3, 32)),
    "gptq 8 bit, shuffled": PackedForm(_named("gptq", bits=8), gptq(8, 32, shuffled=True)),
    "gptq, second form": PackedForm(
        _named("gptq", bits=4, checkpoint_format="gptq_v2"), gptq(4, 32, second=True)
    ),
    "awq": PackedForm(_named("awq", bits=4, group_size=32), awq),
}
