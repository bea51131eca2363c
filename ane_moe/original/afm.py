"""Apple's on-device foundation model in plain PyTorch, in the place of Hugging Face's model: no
release of transformers has it.

Written from what is public of its architecture (arXiv 2507.13575; mlx-lm's `afm7`; torchtitan's
`AFMTextV7ModelArgs`) and nothing else of ours. The last `num_kv_reuse_layers` layers have no keys
and values: they read those of the last layer before them. Queries and keys are rotated in pairs of
neighbours, then normed; keys and values are rounded to 8 bits, by one scale each.

A checkpoint has Hugging Face's names, and the two scales beside a layer's projections:
`model.layers.N.self_attn.quant_key_scale` and `.quant_value_scale`, of one number each.

B = sequences, T = tokens, H = heads, K = KV heads, D = head_dim, d = hidden_size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from ane_moe.original.paper_blocks import GatedMlp, RMSNorm

KeysValues = tuple[Tensor, Tensor]  # (B, K, T, D) each


class AfmConfig(PreTrainedConfig):
    model_type = "afm"

    vocab_size: int = 153600
    hidden_size: int = 2048
    intermediate_size: int = 6656
    num_hidden_layers: int = 56
    num_kv_reuse_layers: int = 21
    num_attention_heads: int = 16
    num_key_value_heads: int = 2
    head_dim: int = 128
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    rope_parameters: dict[str, Any] | None = None
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 500000.0}
        super().__post_init__(**kwargs)


class AfmAttention(nn.Module):
    """Grouped-query attention: to keys and values of its own, or (`reuses`) to those handed on."""

    quant_key_scale: Tensor
    quant_value_scale: Tensor

    def __init__(self, config: AfmConfig, reuses: bool):
        super().__init__()
        assert config.rope_parameters is not None
        self.base, self.reuses = config.rope_parameters["rope_theta"], reuses
        self.groups = config.num_attention_heads // config.num_key_value_heads
        d, width, eps = config.hidden_size, config.head_dim, config.rms_norm_eps
        self.width = width
        self.q_proj = nn.Linear(d, config.num_attention_heads * width, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * width, d, bias=False)
        self.q_norm = RMSNorm(width, eps)
        if not reuses:
            self.k_proj = nn.Linear(d, config.num_key_value_heads * width, bias=False)
            self.v_proj = nn.Linear(d, config.num_key_value_heads * width, bias=False)
            self.k_norm = RMSNorm(width, eps)
            # No parameters, since they are no weights: both follow from what they have to hold.
            self.register_buffer("quant_key_scale", torch.full((1,), 1 / 16))
            self.register_buffer("quant_value_scale", torch.full((1,), 1 / 16))

    def forward(self, x: Tensor, handed_on: KeysValues | None) -> tuple[Tensor, KeysValues]:
        """Of `x` (B, T, d) what is attended to, (B, T, d), and the keys and values it was in."""
        if not self.reuses:
            handed_on = self._keys_and_values(x)
        assert handed_on is not None
        q = self.q_norm(self._rotated(self._heads(self.q_proj(x))))
        k, v = (one.repeat_interleave(self.groups, 1) for one in handed_on)
        scores = q @ k.transpose(2, 3) / self.width**0.5  # (B, H, T, T)
        later = torch.ones_like(scores, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        attended = (weights @ v).transpose(1, 2)  # (B, T, H, D)
        return self.o_proj(attended.flatten(2)), handed_on

    def _keys_and_values(self, x: Tensor) -> KeysValues:
        keys = self.k_norm(self._rotated(self._heads(self.k_proj(x))))
        values = self._heads(self.v_proj(x))
        return in_8_bits(keys, self.quant_key_scale), in_8_bits(values, self.quant_value_scale)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.width)).transpose(1, 2)  # (B, heads, T, D)

    def _rotated(self, x: Tensor) -> Tensor:
        """Channels 2i and 2i + 1 of a head turn with each other."""
        pairs = torch.arange(0, self.width, 2) / self.width
        angles = torch.arange(x.shape[2])[:, None] * self.base**-pairs  # (T, D / 2)
        cos, sin = angles.cos(), angles.sin()
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = [even * cos - odd * sin, odd * cos + even * sin]
        return torch.stack(turned, -1).flatten(-2)


def in_8_bits(x: Tensor, scale: Tensor) -> Tensor:
    """The nearest of the 256 values that 8 bits tell apart at this scale; gradients pass as if it
    were `x`."""
    nearest = (x.detach() / scale).round().clamp(-128, 127) * scale
    return nearest + (x - x.detach())  # what is in brackets is 0


class AfmDecoderLayer(nn.Module):
    def __init__(self, config: AfmConfig, reuses: bool):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = AfmAttention(config, reuses)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMlp(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, handed_on: KeysValues | None) -> tuple[Tensor, KeysValues]:
        """The stream after the layer, and the keys and values that the layers after it may read."""
        attended, keys_values = self.self_attn(self.input_layernorm(x), handed_on)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), keys_values


class AfmPreTrainedModel(PreTrainedModel):
    config: AfmConfig
    base_model_prefix = "model"


class AfmModel(AfmPreTrainedModel):
    def __init__(self, config: AfmConfig):
        super().__init__(config)
        count = config.num_hidden_layers
        first = count - config.num_kv_reuse_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([AfmDecoderLayer(config, n >= first) for n in range(count)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(self, input_ids: Tensor, **_: Any) -> BaseModelOutput:
        """The normed hidden states (B, T, d) of whole sequences of tokens (B, T)."""
        x, handed_on = self.embed_tokens(input_ids), None
        for layer in self.layers:
            x, handed_on = layer(x, handed_on)
        return BaseModelOutput(last_hidden_state=self.norm(x))


class AfmForCausalLM(AfmPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: AfmConfig):
        super().__init__(config)
        self.model = AfmModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids).last_hidden_state))

    def prepare_inputs_for_generation(self, input_ids: Tensor, *_: Any, **__: Any) -> Any:
        """All tokens, each time: it keeps nothing."""
        return {"input_ids": input_ids}


AutoConfig.register("afm", AfmConfig)
AutoModelForCausalLM.register(AfmConfig, AfmForCausalLM)
