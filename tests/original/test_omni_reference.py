"""The reference models of shared routers and of MM1, against Hugging Face's own Mixtral and
Llama."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models import CONFIGS, make_model

IDS = torch.arange(3, 30)[None]
ROUNDING = 2e-5
OWN = {"expert_groups", "shared_router", "router_bias", "moe_layer_freq", "num_experts"}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits[0]


def hugging_face(model_type: str, model) -> torch.nn.Module:
    """Another type of model of the same sizes, without its weights."""
    fields = {k: v for k, v in CONFIGS[model.config.model_type].items() if k not in OWN}
    fields |= {"num_local_experts": 12, "num_hidden_layers": model.config.num_hidden_layers}
    config = AutoConfig.for_model(model_type, **fields)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("groups", [[[3, 12]], [[2, 12], [1, 12]]])
def test_shared_routers_are_mixtral_whose_layers_have_copies(groups) -> None:
    fields = {"expert_groups": groups, "router_bias": False, "norm_topk_prob": True}
    model = make_model("omni_moe", **fields)
    state = model.state_dict()
    routers = [state.pop(f"model.routers.{n}.weight") for n in range(len(groups))]
    of_layers = [
        matrix for (layers, _), matrix in zip(groups, routers, strict=True) for _ in range(layers)
    ]
    copies = {f"model.layers.{n}.mlp.gate.weight": one for n, one in enumerate(of_layers)}
    mixtral = hugging_face("mixtral", model)
    mixtral.load_state_dict(state | copies)
    assert (logits(mixtral) - logits(model)).abs().max() < ROUNDING


@pytest.mark.parametrize(("every", "model_type"), [(1, "mixtral"), (5, "llama")])
def test_mm1_with_experts_everywhere_or_nowhere(every: int, model_type: str) -> None:
    model = make_model("mm1_moe", moe_layer_freq=every)
    other = hugging_face(model_type, model)
    other.load_state_dict(model.state_dict())
    assert (logits(other) - logits(model)).abs().max() < ROUNDING


def test_the_last_of_so_many_layers_has_experts() -> None:
    layers = make_model("mm1_moe").model.layers
    assert [hasattr(layer.mlp, "experts") for layer in layers] == [False, True] * 2


@torch.no_grad()
def test_embeddings_may_come_in_the_place_of_tokens() -> None:
    model = make_model("mm1_moe")
    given = model(inputs_embeds=model.get_input_embeddings()(IDS)).logits[0]
    assert torch.equal(given, logits(model))
