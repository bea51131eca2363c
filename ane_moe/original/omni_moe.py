"""A decoder of experts whose layers share a router, in plain PyTorch, in the place of Hugging
Face's model: no release of transformers has it.

Written from arXiv 2507.05724 (one router for all layers, or for each group of layers) and nothing
else of ours. The paper's model hears speech; here its routing is in the usual decoder: rotary
attention, RMS norms, gated experts. A checkpoint has Hugging Face's names; `model.routers` are the
routers, group by group.

B = sequences, T = tokens, d = hidden_size, E = experts, k = experts per token, N = B * T.
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
from transformers.initialization import normal_
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from ane_moe.original.paper_blocks import Experts, RMSNorm, SparseMlp, choice, rotated


class OmniMoeConfig(PreTrainedConfig):
    """`expert_groups` are the groups of layers that share a router, each [layers, experts]; without
    them all layers do, of `num_experts` each. Unless `shared_router`, each layer has its own."""

    model_type = "omni_moe"

    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int = 2048
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: int = 64
    num_experts: int = 8
    expert_groups: list[list[int]] | None = None
    shared_router: bool = True
    router_bias: bool = False
    num_experts_per_tok: int = 1
    norm_topk_prob: bool = False
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_parameters: dict[str, Any] | None = None
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        super().__post_init__(**kwargs)


class OmniMoeAttention(nn.Module):
    """Grouped-query attention to all tokens before, with rotary positions."""

    def __init__(self, config: Any):
        super().__init__()
        self.config, d, width = config, config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(d, config.num_attention_heads * width, bias=False)
        self.k_proj = nn.Linear(d, config.num_key_value_heads * width, bias=False)
        self.v_proj = nn.Linear(d, config.num_key_value_heads * width, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * width, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        split = (batch, tokens, -1, self.config.head_dim)
        q, k, v = (
            projection(x).view(split).transpose(1, 2)  # (B, heads, T, D)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        positions = torch.arange(tokens)
        base = self.config.rope_parameters["rope_theta"]
        q, k = rotated(q, positions, base), rotated(k, positions, base)
        k, v = (one.repeat_interleave(q.shape[1] // k.shape[1], 1) for one in (k, v))
        seen = positions[:, None] >= positions[None, :]
        scores = q @ k.transpose(2, 3) / self.config.head_dim**0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return self.o_proj((weights @ v).transpose(1, 2).reshape(batch, tokens, -1))


class OmniMoeTopKRouter(nn.Module):
    """Has no weights of its own: the matrix is one of the model's, whatever layers share it."""

    def __init__(self, config: Any, matrix: nn.Linear):
        super().__init__()
        self.k, self.renorm = config.num_experts_per_tok, config.norm_topk_prob
        self.shared = (matrix,)  # in a tuple PyTorch does not take it for a part of this module

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For `x` (N, d) logits (N, E), and weights and numbers of the chosen experts (N, k)."""
        logits: Tensor = self.shared[0](x)
        return logits, *choice(logits, self.k, self.renorm)


class OmniMoeDecoderLayer(nn.Module):
    def __init__(self, config: Any, mlp: nn.Module):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = OmniMoeAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        given: Tensor = self.mlp(self.post_attention_layernorm(x))
        return x + given


class OmniMoePreTrainedModel(PreTrainedModel):
    config: Any
    config_class: type[PreTrainedConfig] = OmniMoeConfig
    base_model_prefix = "model"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Experts):
            for parameter in module.parameters(recurse=False):
                normal_(parameter, 0, self.config.initializer_range)


class OmniMoeModel(OmniMoePreTrainedModel):
    def __init__(self, config: Any):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self._add_layers(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def _add_layers(self, config: Any) -> None:
        groups = config.expert_groups or [[config.num_hidden_layers, config.num_experts]]
        if not config.shared_router:
            groups = [[1, experts] for layers, experts in groups for _ in range(layers)]
        self.routers, self.layers = nn.ModuleList(), nn.ModuleList()
        for layers, experts in groups:
            matrix = nn.Linear(config.hidden_size, experts, bias=config.router_bias)
            self.routers.append(matrix)
            for _ in range(layers):
                router = OmniMoeTopKRouter(config, matrix)
                widths = config.hidden_size, config.intermediate_size
                mlp = SparseMlp(router, Experts(experts, *widths))
                self.layers.append(OmniMoeDecoderLayer(config, mlp))

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutput:
        """The normed hidden states (B, T, d) of tokens (B, T), or of their embeddings (B, T, d)."""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.layers:
            x = layer(x)
        return BaseModelOutput(last_hidden_state=self.norm(x))


class OmniMoeForCausalLM(OmniMoePreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    inner: type[OmniMoeModel] = OmniMoeModel

    def __init__(self, config: Any):
        super().__init__(config)
        self.model = self.inner(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.generation_config.use_cache = False  # there is none: each token costs all before it
        self.post_init()

    def forward(self, input_ids: Tensor | None = None, **more: Any) -> CausalLMOutput:
        hidden = self.model(input_ids, **more).last_hidden_state
        return CausalLMOutput(logits=self.lm_head(hidden))


AutoConfig.register("omni_moe", OmniMoeConfig)
AutoModelForCausalLM.register(OmniMoeConfig, OmniMoeForCausalLM)
