"""Small Hugging Face models, traced and converted at every target and precision, executed here as
PyTorch does."""

import functools
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf

from ane_moe.coreml_tools import ct, validating_once
from ane_moe.runtime import load_package

COSINE_FP16 = 0.9999
ERROR_FP32 = 1e-4  # largest, relative to the largest output

TARGETS = {
    "ios15": ct.target.iOS15,
    "ios16": ct.target.iOS16,
    "ios17": ct.target.iOS17,
    "ios18": ct.target.iOS18,
}
PRECISIONS = {"fp16": ct.precision.FLOAT16, "fp32": ct.precision.FLOAT32}

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "attn_implementation": "eager",
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
MOE = {**GROUPED, "num_experts_per_tok": 2, "experts_implementation": "batched_mm"}
IDS = torch.arange(3, 11)[None] % 64
IMAGE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Decoder(torch.nn.Module):
    """ids [1, T] -> logits, the causal mask given so that nothing in the trace depends on data."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.shape[1]
        mask = torch.full((tokens, tokens), -1e4).triu(1)[None, None]
        positions = torch.arange(tokens)[None]
        return self.model(
            input_ids=x, attention_mask=mask, position_ids=positions, use_cache=False
        )[0]


class Encoder(torch.nn.Module):
    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x, attention_mask=torch.zeros(1, 1, x.shape[1], x.shape[1]))[0]


class Pair(torch.nn.Module):
    """A text-to-text model, its decoder fed the first ids of its encoder."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=x, decoder_input_ids=x[:, :4], use_cache=False)[0]


class Vision(torch.nn.Module):
    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)[0]


MODELS: dict[str, tuple[Callable[[], torch.nn.Module], torch.Tensor]] = {
    "llama": (lambda: Decoder(hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED))), IDS),
    "qwen3": (lambda: Decoder(hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=8))), IDS),
    "gpt2": (
        lambda: Decoder(
            hf.GPT2LMHeadModel(
                hf.GPT2Config(
                    n_embd=32, n_layer=1, n_head=4, vocab_size=64, attn_implementation="eager"
                )
            )
        ),
        IDS,
    ),
    "qwen3_moe": (
        lambda: Decoder(
            hf.Qwen3MoeForCausalLM(
                hf.Qwen3MoeConfig(**MOE, num_experts=4, moe_intermediate_size=24, head_dim=8)
            )
        ),
        IDS,
    ),
    "mixtral": (
        lambda: Decoder(hf.MixtralForCausalLM(hf.MixtralConfig(**MOE, num_local_experts=4))),
        IDS,
    ),
    "bert": (lambda: Encoder(hf.BertModel(hf.BertConfig(**SMALL))), IDS),
    "t5": (
        lambda: Pair(
            hf.T5ForConditionalGeneration(
                hf.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=64)
            )
        ),
        IDS,
    ),
    "vit": (
        lambda: Vision(
            hf.ViTModel(hf.ViTConfig(**{**SMALL, "vocab_size": None}, image_size=32, patch_size=8))
        ),
        IMAGE,
    ),
    "resnet": (
        lambda: Vision(
            hf.ResNetModel(
                hf.ResNetConfig(
                    embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
                )
            )
        ),
        IMAGE,
    ),
    "convnext": (
        lambda: Vision(
            hf.ConvNextModel(hf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2))
        ),
        IMAGE,
    ),
}


@functools.cache
def traced(name: str) -> tuple[torch.jit.ScriptModule, torch.Tensor, np.ndarray]:
    """The model traced, its input, and what PyTorch makes of it."""
    build, x = MODELS[name]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        model = build().eval()
        return (
            torch.jit.trace(model, x, strict=False, check_trace=False),
            x,
            model(x).double().numpy(),
        )


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model_computes_what_pytorch_does(
    name: str, target: str, precision: str, tmp_path: Path
) -> None:
    trace, x, expected = traced(name)
    integers = x.dtype == torch.int64
    # A program that a pass has spoiled does not compute what PyTorch does.
    with warnings.catch_warnings(action="ignore"), validating_once():
        model = ct.convert(
            trace,
            inputs=[ct.TensorType("x", tuple(x.shape), np.int32 if integers else np.float32)],
            minimum_deployment_target=TARGETS[target],
            compute_precision=PRECISIONS[precision],
            skip_model_load=True,
        )
    path = tmp_path / "model.mlpackage"
    model.save(str(path))
    (ours,) = list(load_package(path, runtime="reference").predict({"x": x.numpy()}).values())[:1]
    assert ours.shape == expected.shape
    if precision == "fp16":
        a, b = ours.astype(np.float64).ravel(), expected.ravel()
        assert a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) >= COSINE_FP16
    else:
        assert abs(ours - expected).max() <= ERROR_FP32 * abs(expected).max()
