"""What fp16 costs a gated delta net over a long text: our part, rounded to fp16 after each
operation, beside transformers' own module in fp32 with the same weights.

    python scripts/measure_delta_net.py [--tokens 2048]

Errors are relative (L2): of what the mixer gives for the last 256 tokens, and of the memory after
all of them; `plain`: the memory's where it is multiplied by exp(g), which fp16 rounds to steps of
2^-11 near 1. Functions are exact here; engines have tables for them (docs/runtime.md).
"""

import argparse
import math
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import DynamicCache
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeGatedDeltaNet

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ane_moe.model.delta_net import DeltaNetConfig, DeltaNetSpec  # noqa: E402
from ane_moe.model.spec import NormSpec  # noqa: E402
from ane_moe.parts import delta_net  # noqa: E402
from ane_moe.parts.unbound import build_unbound  # noqa: E402

D, LAST, EPS = 256, 256, 1e-6
SPEC = DeltaNetSpec(2, 4, 128, 128, 4, EPS)  # two of Qwen3.5-35B-A3B's key heads
CONFIG = Qwen3_5MoeTextConfig(
    hidden_size=D,
    linear_num_key_heads=SPEC.key_heads,
    linear_num_value_heads=SPEC.value_heads,
    layer_types=["linear_attention"],
    num_hidden_layers=1,
)
WIDTHS = (1, 16, 64, 128)
# What is left of a head's memory after a token without input, by its heads.
DECAYS = {
    "fast: 0.1 to 0.9 a token": (0.1, 0.5, 0.7, 0.9),
    "medium: 0.97 to 0.996": (0.97, 0.98, 0.99, 0.996),
    "slow: 0.999 to 0.9999": (0.999, 0.9995, 0.9998, 0.9999),
}


def original(left: tuple[float, ...]) -> Qwen3_5MoeGatedDeltaNet:
    """transformers' module with random weights that fp16 holds exactly."""
    torch.manual_seed(0)
    module = Qwen3_5MoeGatedDeltaNet(CONFIG, 0).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.normal_(0, D**-0.5).half())
        module.conv1d.weight.normal_(0, 0.5)
        module.norm.weight.fill_(1)
        # exp(A_log) softplus(dt_bias) is the decay; softplus of -4 is 0.018.
        small = math.log1p(math.exp(-4))
        module.dt_bias.fill_(-4)
        module.A_log.copy_(torch.tensor([math.log(-math.log(one) / small) for one in left]))
        for parameter in module.parameters():
            parameter.copy_(parameter.half())
    return module


def ours(module: Qwen3_5MoeGatedDeltaNet):
    """Our part with its weights, in fp16."""
    config = DeltaNetConfig(D, NormSpec(), SPEC, slots=32, explicit=True)
    block = build_unbound(config).to_empty(device="cpu").half().eval()
    query, key, value = module.in_proj_qkv.weight.split([SPEC.queries, SPEC.keys, SPEC.values])
    values = {
        "query.weight": query,
        "key.weight": key,
        "value.weight": value,
        "z.weight": module.in_proj_z.weight,
        "beta.weight": module.in_proj_b.weight,
        "decay.weight": module.in_proj_a.weight,
        "decay.bias": module.dt_bias,
        "decay.rate": module.A_log,
        "conv.weight": module.conv1d.weight,
        "value_norm.weight": module.norm.weight,
        "o.weight": module.out_proj.weight,
        "norm.weight": torch.ones(D),
    }
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.copy_(values[name].reshape(parameter.shape))
    return block


@torch.no_grad()
def through(block, h: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the mixer gives in calls of `width` tokens, `(N, d)`, and its memory in the end."""
    states = {port.name: torch.zeros(port.shape).half() for port in block.config.states}
    rows = []
    ports = {port.name: port.shape for port in block.ports(width).inputs}
    given = {"shift": torch.zeros(ports["shift"]).half()}
    for column in range(SPEC.history):
        given["shift"][0, 0, width + column, column] = 1
    if "real" in ports:
        given["real"] = torch.ones(ports["real"]).half()
    for first in range(0, len(h), width):
        x = h[first : first + width].T[None, :, None].half()
        y, states = block.mix(x, given | states)
        rows.append(y[0, :, 0].T.float())
    return torch.cat(rows), states["memory"].float()


@torch.no_grad()
def expected(module, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of transformers' module, in fp32."""
    cache = DynamicCache(config=CONFIG)
    given = module(h[None], cache_params=cache)[0]
    return given, cache.get_recurrent_state(0, state_idx=0).transpose(2, 3)


def off(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    tokens = parser.parse_args().tokens
    torch.set_num_threads(1)
    print("| left of the memory | tokens a call | last results | memory | plain |")
    print("|---|---:|---:|---:|---:|")
    for name, left in DECAYS.items():
        module = original(left)
        h = torch.randn(tokens, D).half().float()
        exact, memory = expected(module, h)
        block = ours(module)
        for width in WIDTHS:
            given, kept = through(block, h, width)
            with patch.object(delta_net, "lost", lambda decay: delta_net.left(decay) - 1):
                _, plain = through(block, h, width)
            errors = off(given[-LAST:], exact[-LAST:]), off(kept, memory), off(plain, memory)
            print(f"| {name} | {width} | " + " | ".join(f"{one:.1e}" for one in errors) + " |")


if __name__ == "__main__":
    main()
