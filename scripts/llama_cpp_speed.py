"""Greedy text from llama.cpp on the CPU: the same weights in its Q8_0, its speed without loading.

    PYTHONPATH=. PYTHON scripts/llama_cpp_speed.py CHECKPOINT --gguf FILE [--tokens 16]

`PYTHON` is one that has llama-cpp-python, no dependency of this project, and gguf. The checkpoint
is OLMoE's geometry as make_checkpoint.py writes it; the file is written where it is missing, tensor
by tensor. Q8_0 keeps int8 with a scale for 32 weights, so the bytes read for a token are those of
our int8 and 6 % more.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants

from ane_moe.checkpoints.gguf.architectures import ARCHITECTURES, TOP
from ane_moe.checkpoints.safetensors_header import read_header
from ane_moe.checkpoints.stored_tensor import StoredTensor
from ane_moe.half import STORED, widened

PROMPT = range(1000, 1032)
EXPERTS = ("gate", "up", "down")
WHOLE = ("norm", "gate_inp")  # what llama.cpp keeps in fp32


def tensor_keys(config: dict) -> Iterator[tuple[str, list[str]]]:
    """llama.cpp's name of each tensor, and the checkpoint's tensors that it stacks."""
    for name, key in TOP.items():
        yield f"{name}.weight", [f"{key}.weight"]
    for layer in range(config["num_hidden_layers"]):
        for name, key in ARCHITECTURES["olmoe"].names.items():
            yield f"blk.{layer}.{name}.weight", [f"model.layers.{layer}.{key}.weight"]
        for name in EXPERTS:
            start = f"model.layers.{layer}.mlp.experts"
            keys = [f"{start}.{e}.{name}_proj.weight" for e in range(config["num_experts"])]
            yield f"blk.{layer}.ffn_{name}_exps.weight", keys


def fp32(tensor: StoredTensor) -> np.ndarray:
    with tensor.path.open("rb") as stream:
        stream.seek(tensor.offset)
        stored = np.frombuffer(stream.read(tensor.size), STORED[tensor.dtype])
    return widened(stored, tensor.dtype).reshape(tensor.shape)


def write_gguf(checkpoint: Path, file: Path) -> None:
    """The checkpoint's weights in Q8_0, one expert in memory at a time."""
    config = json.loads((checkpoint / "config.json").read_text())
    stored: dict[str, StoredTensor] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        stored |= read_header(path)
    writer = GGUFWriter(file, "olmoe")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    tensors = dict(tensor_keys(config))
    for name, keys in tensors.items():
        shape = stored[keys[0]].shape if len(keys) == 1 else (len(keys), *stored[keys[0]].shape)
        kind = _kind(name)
        bytes_shape = quants.quant_shape_to_byte_shape(shape, kind)
        size = int(np.prod(bytes_shape))
        writer.add_tensor_info(name, bytes_shape, np.dtype(np.uint8), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, keys in tensors.items():
        parts = [quants.quantize(fp32(stored[key]), _kind(name)) for key in keys]
        writer.write_tensor_data(np.concatenate(parts) if len(parts) > 1 else parts[0])
    writer.close()


def _kind(name: str) -> GGMLQuantizationType:
    whole = any(part in name for part in WHOLE)
    return GGMLQuantizationType.F32 if whole else GGMLQuantizationType.Q8_0


def speed(file: Path, tokens: int, threads: int) -> str:
    """What it takes to go on from the prompt by `tokens` of the likeliest tokens."""
    from llama_cpp import Llama

    model = Llama(str(file), n_ctx=256, n_threads=threads, n_threads_batch=threads, verbose=False)
    steps = model.generate(list(PROMPT), temp=0.0)
    started = time.monotonic()
    next(steps)
    first = time.monotonic() - started
    for _ in range(tokens):
        next(steps)
    decoding = time.monotonic() - started - first
    return f"{tokens / decoding:.2f} tok/s decoding, prompt and one {first:.2f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    if not given.gguf.is_file():
        write_gguf(given.checkpoint, given.gguf)
    print(speed(given.gguf, given.tokens, given.threads))


if __name__ == "__main__":
    main()
