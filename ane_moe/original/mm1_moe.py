"""The language model of MM1 with experts, in plain PyTorch, in the place of Hugging Face's model:
no release of transformers has it.

Written from arXiv 2403.09611: of every `moe_layer_freq` layers the last has experts, each as wide
as the feed-forward block that it stands for, and a token goes to two of them. What the paper leaves
open is as in the usual decoder (omni_moe.py). A picture's tokens come as `inputs_embeds`.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.initialization import normal_

from ane_moe.original.omni_moe import (
    OmniMoeDecoderLayer,
    OmniMoeForCausalLM,
    OmniMoeModel,
    OmniMoePreTrainedModel,
)
from ane_moe.original.paper_blocks import Experts, GatedMlp, SparseMlp, TopKRouter


class Mm1MoeConfig(PreTrainedConfig):
    model_type = "mm1_moe"

    vocab_size: int = 32000
    hidden_size: int = 2560
    intermediate_size: int = 7936
    num_hidden_layers: int = 32
    moe_layer_freq: int = 2
    num_attention_heads: int = 20
    num_key_value_heads: int = 20
    head_dim: int = 128
    num_experts: int = 64
    num_experts_per_tok: int = 2
    norm_topk_prob: bool = True
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_parameters: dict[str, Any] | None = None
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        super().__post_init__(**kwargs)


class Mm1MoePreTrainedModel(OmniMoePreTrainedModel):
    config_class = Mm1MoeConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TopKRouter):
            normal_(module.weight, 0, self.config.initializer_range)


class Mm1MoeModel(Mm1MoePreTrainedModel, OmniMoeModel):
    def _add_layers(self, config: Mm1MoeConfig) -> None:
        self.layers = nn.ModuleList()
        widths = config.hidden_size, config.intermediate_size
        for number in range(1, config.num_hidden_layers + 1):
            mlp: nn.Module = GatedMlp(*widths)
            if number % config.moe_layer_freq == 0:
                mlp = SparseMlp(TopKRouter(config), Experts(config.num_experts, *widths))
            self.layers.append(OmniMoeDecoderLayer(config, mlp))


class Mm1MoeForCausalLM(Mm1MoePreTrainedModel, OmniMoeForCausalLM):
    inner = Mm1MoeModel


AutoConfig.register("mm1_moe", Mm1MoeConfig)
AutoModelForCausalLM.register(Mm1MoeConfig, Mm1MoeForCausalLM)
