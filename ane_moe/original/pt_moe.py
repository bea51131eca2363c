"""PT-MoE in plain PyTorch, in the place of Hugging Face's model: no release of transformers has it.

Written from arXiv 2602.07306 (tracks), 2507.13575 (which layers have experts, windows and rotation)
and nothing else of ours. What these leave open is a field of the configuration, whose heads are
those of all tracks together, as published; widths, experts and layers are those of one track.

A checkpoint has Hugging Face's names. `model.layers` are the layers of all tracks in the order in
which they run one by one: block after block of `track_depth`, in a block track after track.

B = sequences, T = tokens, d = hidden_size, E = experts, k = experts per token, N = B * T.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from ane_moe.original.paper_blocks import (
    Experts,
    GatedMlp,
    RMSNorm,
    SparseMlp,
    TopKRouter,
    rotated,
)

FULL, SLIDING = "full_attention", "sliding_attention"


class PtMoeConfig(PreTrainedConfig):
    """`track_depth` 0 is no model of tracks but tensor parallelism, the unsplit layer with its
    heads and widths dealt out: whatever the tracks give is added after either half of a layer."""

    model_type = "pt_moe"

    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int = 1024
    moe_intermediate_size: int = 512
    num_hidden_layers: int = 32
    num_tracks: int = 8
    track_depth: int = 4
    track_reduce: str = "mean"
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 64
    num_experts: int = 8
    num_experts_per_tok: int = 2
    norm_topk_prob: bool = True
    layer_types: list[str] | None = None
    mlp_layer_types: list[str] | None = None
    sliding_window: int = 4096
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
        numbers = range(self.num_hidden_layers)
        self.layer_types = self.layer_types or [FULL if n % 4 == 3 else SLIDING for n in numbers]
        if self.mlp_layer_types is None:
            self.mlp_layer_types = ["sparse" if n % 2 else "dense" for n in numbers]
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        super().__post_init__(**kwargs)


class PtMoeAttention(nn.Module):
    """Grouped-query attention of one track: with a window and rotation, or with neither."""

    def __init__(self, config: PtMoeConfig, kind: str):
        super().__init__()
        self.local, self.config = kind == SLIDING, config
        self.heads = config.num_attention_heads // config.num_tracks
        self.kv_heads = config.num_key_value_heads // config.num_tracks
        width, d = config.head_dim, config.hidden_size
        self.q_proj = nn.Linear(d, self.heads * width, bias=False)
        self.k_proj = nn.Linear(d, self.kv_heads * width, bias=False)
        self.v_proj = nn.Linear(d, self.kv_heads * width, bias=False)
        self.o_proj = nn.Linear(self.heads * width, d, bias=False)

    def forward(self, x: Tensor, first: int) -> Tensor:
        """`x` (B, T, d), whose first token stands at the position `first`."""
        batch, tokens, _ = x.shape
        split = (batch, tokens, -1, self.config.head_dim)
        q, k, v = (
            projection(x).view(split).transpose(1, 2)  # (B, heads, T, D)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        positions = torch.arange(first, first + tokens)
        if self.local:
            assert self.config.rope_parameters is not None
            base = self.config.rope_parameters["rope_theta"]
            q, k = rotated(q, positions, base), rotated(k, positions, base)
        k, v = (one.repeat_interleave(self.heads // self.kv_heads, 1) for one in (k, v))
        back = positions[:, None] - positions[None, :]
        seen = (back >= 0) & (back < self.config.sliding_window) if self.local else back >= 0
        scores = q @ k.transpose(2, 3) / self.config.head_dim**0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return self.o_proj((weights @ v).transpose(1, 2).reshape(batch, tokens, -1))


class PtMoeDecoderLayer(nn.Module):
    """A layer of one track."""

    def __init__(self, config: PtMoeConfig, kind: str, mlp_kind: str):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = PtMoeAttention(config, kind)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        d, wide, narrow = config.hidden_size, config.intermediate_size, config.moe_intermediate_size
        self.mlp: nn.Module = (
            SparseMlp(TopKRouter(config), Experts(config.num_experts, d, narrow))
            if mlp_kind == "sparse"
            else GatedMlp(d, wide)
        )

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        x = x + self.attended(x, first)
        return x + self.fed(x)

    def attended(self, x: Tensor, first: int) -> Tensor:
        return self.self_attn(self.input_layernorm(x), first)

    def fed(self, x: Tensor) -> Tensor:
        given: Tensor = self.mlp(self.post_attention_layernorm(x))
        return given


class PtMoePreTrainedModel(PreTrainedModel):
    config: PtMoeConfig
    base_model_prefix = "model"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Experts | TopKRouter):
            for parameter in module.parameters(recurse=False):
                parameter.normal_(0, self.config.initializer_range)


class PtMoeModel(PtMoePreTrainedModel):
    def __init__(self, config: PtMoeConfig):
        super().__init__(config)
        assert config.layer_types is not None and config.mlp_layer_types is not None
        kinds = list(zip(config.layer_types, config.mlp_layer_types, strict=True))
        self.depth = config.track_depth or 1
        blocks = [kinds[n : n + self.depth] for n in range(0, len(kinds), self.depth)]
        # By block and track the numbers of its layers.
        self.blocks: list[list[range]] = []
        layers: list[nn.Module] = []
        for block in blocks:
            self.blocks.append([])
            for _ in range(config.num_tracks):
                self.blocks[-1].append(range(len(layers), len(layers) + len(block)))
                layers += [PtMoeDecoderLayer(config, *kind) for kind in block]
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(
        self, input_ids: Tensor, first: int = 0, use_cache: bool = False, **_: Any
    ) -> BaseModelOutput:
        """The normed hidden states (B, T, d) of tokens (B, T) from the position `first` on."""
        x = self.embed_tokens(input_ids)
        for block in self.blocks:
            if self.config.track_depth:
                x = self.meet([self._track(numbers, x, first) for numbers in block])
            else:
                x = self._unsplit(block, x, first)
        return BaseModelOutput(last_hidden_state=self.norm(x))

    def _track(self, numbers: range, x: Tensor, first: int) -> Tensor:
        for number in numbers:
            x = self.layers[number](x, first)
        return x

    def _unsplit(self, block: list[range], x: Tensor, first: int) -> Tensor:
        layers: list[Any] = [self.layers[numbers[0]] for numbers in block]
        x = x + sum(layer.attended(x, first) for layer in layers)
        return x + sum(layer.fed(x) for layer in layers)

    def meet(self, streams: Sequence[Tensor]) -> Tensor:
        """What all tracks go on with."""
        stacked = torch.stack(list(streams))
        return stacked.mean(0) if self.config.track_reduce == "mean" else stacked.sum(0)

    def reads(self, number: int) -> tuple[int, ...]:
        """The layers whose outputs make up what a layer is given; of the final norm, with the
        number after the last. -1 stands for the embedding."""
        given: tuple[int, ...] = (-1,)
        for block in self.blocks:
            for numbers in block:
                if number in numbers:
                    return given if number == numbers[0] else (number - 1,)
            given = tuple(numbers[-1] for numbers in block)
        return given


class PtMoeForCausalLM(PtMoePreTrainedModel):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: PtMoeConfig):
        super().__init__(config)
        self.model = PtMoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, **more: Any) -> CausalLMOutput:
        hidden = self.model(input_ids, **more).last_hidden_state
        return CausalLMOutput(logits=self.lm_head(hidden))


AutoConfig.register("pt_moe", PtMoeConfig)
AutoModelForCausalLM.register(PtMoeConfig, PtMoeForCausalLM)
