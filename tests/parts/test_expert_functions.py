"""Expert functions and the routed attention against Hugging Face's own layer, and against the
masked block."""

import pytest
import torch

from ane_moe.model.attention import AttentionConfig
from ane_moe.model.experts import ExpertGroupConfig, SharedExpertConfig
from ane_moe.model.moe import MoeConfig
from ane_moe.model.port import shapes_of
from ane_moe.model.routed import RoutedMixerConfig
from ane_moe.model.spec import GqaSpec, MlpSpec, MoeSpec, NormSpec, RouterSpec, SharedSpec
from ane_moe.parts.experts import ExpertGroup, SharedExpert
from ane_moe.parts.moe import Moe
from ane_moe.parts.routed import RoutedMixer
from tests.models import make_model

TOKENS = 7


def as_conv(weight: torch.Tensor) -> torch.Tensor:
    return weight[:, :, None, None]


def experts_of(layer: torch.nn.Module, first: int, size: int) -> ExpertGroup:
    """Experts of a Hugging Face layer as one group."""
    experts = layer.mlp.experts
    config = ExpertGroupConfig(experts.hidden_dim, MlpSpec(experts.intermediate_dim), size)
    weights = {}
    for e in range(size):
        gate, up = experts.gate_up_proj[first + e].chunk(2)
        weights |= {
            f"experts.{e}.{name}.weight": as_conv(weight)
            for name, weight in (("gate", gate), ("up", up), ("down", experts.down_proj[first + e]))
        }
    block = ExpertGroup(config).eval()
    block.load_state_dict(weights)
    return block


@torch.no_grad()
@pytest.mark.parametrize("first, size", [(3, 1), (4, 3)])
def test_a_group_gives_its_experts_weighted_by_their_gates(first, size):
    layer = make_model("qwen3_moe").model.layers[0]
    x, gates = torch.randn(TOKENS, 72), torch.rand(TOKENS, size)
    chosen = torch.arange(first, first + size).expand(TOKENS, size)
    expected = layer.mlp.experts(x, chosen, gates)
    block = experts_of(layer, first, size)
    name = "gate" if size == 1 else "gates"
    y = block(ffn_input=x.T[None, :, None], **{name: gates.T[None, :, None]})["y"]
    torch.testing.assert_close(y[0, :, 0].T, expected, atol=1e-5, rtol=1e-4)
    assert shapes_of(block.ports(4).inputs) == {"ffn_input": (1, 72, 1, 4), name: (1, size, 1, 4)}


@torch.no_grad()
@pytest.mark.parametrize("gated", [True, False])
def test_routed_attention_experts_and_shared_expert_add_up_to_the_masked_block(gated):
    norm, spec = NormSpec(), MoeSpec(RouterSpec(6, 2), MlpSpec(12), SharedSpec(MlpSpec(16), gated))
    attention = AttentionConfig(
        20, norm, GqaSpec(2, 1, 8, 8**-0.5, None), rotary=0, slots=32, explicit=True
    )
    torch.manual_seed(0)
    routed = RoutedMixer(RoutedMixerConfig(attention, spec.router))
    masked = Moe(MoeConfig(20, norm, spec, 6, True))
    shared = SharedExpert(SharedExpertConfig(20, spec.shared))
    group = ExpertGroup(ExpertGroupConfig(20, spec.expert, 6))
    for parameter in [*routed.parameters(), *masked.parameters()]:
        torch.nn.init.normal_(parameter, std=0.4)
    weights = masked.state_dict()
    routed.ffn.load_state_dict({name: weights[name] for name in routed.ffn.state_dict()})
    shared.load_state_dict({name: weights[name] for name in shared.state_dict()})
    group.load_state_dict({name: weights[name] for name in group.state_dict()})
    inputs = {
        name: torch.randn(shape) for name, shape in shapes_of(routed.ports(TOKENS).inputs).items()
    }
    outputs = routed(**inputs)
    assert outputs.keys() == {"y", "k_cache_out", "v_cache_out", "ffn_input", "gates"}
    torch.testing.assert_close(outputs["y"], routed.attn(**inputs)["y"])
    expected = masked(x=outputs["y"])
    torch.testing.assert_close(outputs["gates"], expected["gates"])
    dispatched = group(ffn_input=outputs["ffn_input"], gates=outputs["gates"])["y"]
    total = outputs["y"] + shared(ffn_input=outputs["ffn_input"])["y"] + dispatched
    torch.testing.assert_close(total, expected["y"], atol=1e-4, rtol=1e-4)
