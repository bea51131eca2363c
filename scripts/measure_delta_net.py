"""What fp16 costs delta nets and lightning attention over a long text: our part, rounded to fp16
after each operation, beside transformers' own module in fp32 with the same weights.

    python scripts/measure_delta_net.py [--tokens 2048] [--decays head|channel|fixed]

Errors are relative (L2): of what the mixer gives for the last 256 tokens, and of the memory after
all of them; `plain`: the memory's where it is multiplied by exp(g), which fp16 rounds to steps of
2^-11 near 1. Functions are exact here; engines have tables for them (docs/runtime.md).
"""

import argparse
import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import DynamicCache
from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention
from transformers.models.minimax.configuration_minimax import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeGatedDeltaNet

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ane_moe.model.delta_net import DeltaNetConfig, DeltaNetSpec  # noqa: E402
from ane_moe.model.kda import KdaConfig, KdaSpec  # noqa: E402
from ane_moe.model.lightning import LightningConfig, LightningSpec  # noqa: E402
from ane_moe.model.mixer import MixerConfig  # noqa: E402
from ane_moe.model.spec import NormSpec  # noqa: E402
from ane_moe.parts import delta_net, lightning  # noqa: E402
from ane_moe.parts.unbound import build_unbound  # noqa: E402

D, LAST, EPS = 256, 256, 1e-6
SPEC = DeltaNetSpec(2, 4, 128, 128, 4, EPS)  # two of Qwen3.5-35B-A3B's key heads
KDA = KdaSpec(4, 4, 128, 128, 4, EPS, rank=128)  # four of Kimi-Linear-48B-A3B's heads
LIGHTNING = LightningSpec(4, 128, EPS)  # four of MiniMax-Text-01's heads
LAYERS: dict[str, Any] = {"layer_types": ["linear_attention"], "num_hidden_layers": 1}

WIDTHS = (1, 16, 64, 128)
# What is left of a head's memory after a token without input, by its heads.
DECAYS = {
    "fast: 0.1 to 0.9 a token": (0.1, 0.5, 0.7, 0.9),
    "medium: 0.97 to 0.996": (0.97, 0.98, 0.99, 0.996),
    "slow: 0.999 to 0.9999": (0.999, 0.9995, 0.9998, 0.9999),
    "nearly all: 0.99999": (0.99999,) * 4,
}


@dataclass(frozen=True)
class Net:
    """A kind of delta net: our part, and transformers' module with the names of its weights."""

    config: MixerConfig
    theirs: Any
    module: type
    names: Callable[[Any], dict[str, torch.Tensor]]

    @torch.no_grad()
    def original(self, left: tuple[float, ...]) -> Any:
        """transformers' module with random weights that fp16 holds exactly."""
        torch.manual_seed(0)
        module = self.module(self.theirs, 0).eval()
        weights = self.names(module)
        for parameter in module.parameters():
            parameter.normal_(0, D**-0.5)
        module.conv1d.weight.normal_(0, 0.5)
        weights["value_norm.weight"].fill_(1)
        # exp(rate) softplus(bias) is the decay; softplus of -4 is 0.018.
        small, rate = math.log1p(math.exp(-4)), weights["decay.rate"]
        weights["decay.bias"].fill_(-4)
        rates = torch.tensor([math.log(-math.log(one) / small) for one in left])
        rate.copy_(rates.reshape(rate.shape))
        for parameter in module.parameters():
            parameter.copy_(parameter.half())
        return module

    @torch.no_grad()
    def ours(self, module: Any) -> Any:
        """Our part with its weights, in fp16."""
        block = build_unbound(self.config).to_empty(device="cpu").half().eval()
        values = self.names(module) | {"norm.weight": torch.ones(D)}
        for name, parameter in block.named_parameters():
            parameter.copy_(values[name].reshape(parameter.shape))
        return block

    @torch.no_grad()
    def expected(self, module: Any, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the module gives in fp32, and its memory in the end."""
        cache = DynamicCache(config=self.theirs)
        given = module(h[None], cache_params=cache)[0]
        return given, cache.get_recurrent_state(0, state_idx=0).transpose(2, 3)


class Lightning(Net):
    """Lightning attention: what is left is a fact of its heads."""

    @torch.no_grad()
    def original(self, left: tuple[float, ...]) -> Any:
        torch.manual_seed(0)
        module = self.module(self.theirs, 0).eval()
        for parameter in module.parameters():
            parameter.copy_(parameter.normal_(0, D**-0.5).half())
        module.norm.weight.fill_(1)
        slopes = torch.tensor([-math.log(one) for one in left]).half().float()
        module.slope_rate.copy_(slopes.reshape(module.slope_rate.shape))
        names = ("query_decay", "key_decay", "diagonal_decay")
        for name, factors in zip(names, module.decay_factors(module.slope_rate), strict=True):
            getattr(module, name).copy_(factors)
        return module

    @torch.no_grad()
    def expected(self, module: Any, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        given, memory = module(h[None], None, None)
        return given[0], lightning.SHARE * memory.transpose(2, 3)


def by_slope(module: Any) -> dict[str, torch.Tensor]:
    heads = module.qkv_proj.weight.reshape(LIGHTNING.heads, 3, LIGHTNING.head_dim, D)
    return {
        **{f"{name}.weight": heads[:, n] for n, name in enumerate(("query", "key", "value"))},
        "gate.weight": module.output_gate.weight,
        "slope.weight": module.slope_rate,
        "mixed_norm.weight": module.norm.weight,
        "o.weight": module.out_proj.weight,
    }


def by_head(module: Any) -> dict[str, torch.Tensor]:
    query, key, value = module.in_proj_qkv.weight.split([SPEC.queries, SPEC.keys, SPEC.values])
    return {
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
    }


def by_channel(module: Any) -> dict[str, torch.Tensor]:
    gate, names = module.forget_gate, ("query", "key", "value")
    convolutions = zip(names, module.conv1d.weight.chunk(3), strict=True)
    return {
        **{f"{name}.weight": getattr(module, f"{name[0]}_proj").weight for name in names},
        **{f"{name}_conv.weight": weight for name, weight in convolutions},
        "z_down.weight": module.g_a_proj.weight,
        "z.weight": module.g_b_proj.weight,
        "beta.weight": module.b_proj.weight,
        "decay_down.weight": gate.f_a_proj.weight,
        "decay.weight": gate.f_b_proj.weight,
        "decay.bias": gate.dt_bias,
        "decay.rate": gate.A_log,
        "value_norm.weight": module.o_norm.weight,
        "o.weight": module.o_proj.weight,
    }


FORM: dict[str, Any] = {"slots": 32, "explicit": True}
QWEN = Qwen3_5MoeTextConfig(
    hidden_size=D, linear_num_key_heads=SPEC.key_heads, linear_num_value_heads=4, **LAYERS
)
MINIMAX = MiniMaxConfig(hidden_size=D, num_attention_heads=4, head_dim=128, **LAYERS)
KIMI = KimiLinearConfig(hidden_size=D, linear_num_heads=4, rms_norm_eps=EPS, **LAYERS)
NETS = {
    "head": Net(
        DeltaNetConfig(D, NormSpec(), SPEC, **FORM), QWEN, Qwen3_5MoeGatedDeltaNet, by_head
    ),
    "channel": Net(
        KdaConfig(D, NormSpec(), KDA, **FORM), KIMI, KimiLinearDeltaAttention, by_channel
    ),
    "fixed": Lightning(
        LightningConfig(D, NormSpec(), LIGHTNING, **FORM),
        MINIMAX,
        MiniMaxLightningAttention,
        by_slope,
    ),
}


@torch.no_grad()
def through(block, h: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the mixer gives in calls of `width` tokens, `(N, d)`, and its memory in the end."""
    states = {port.name: torch.zeros(port.shape).half() for port in block.config.states}
    rows = []
    ports = {port.name: port.shape for port in block.ports(width).inputs}
    given = {}
    if "shift" in ports:
        given["shift"] = torch.zeros(ports["shift"]).half()
        for column in range(block.config.mixer.history):
            given["shift"][0, 0, width + column, column] = 1
    if "real" in ports:
        given["real"] = torch.ones(ports["real"]).half()
    for first in range(0, len(h), width):
        x = h[first : first + width].T[None, :, None].half()
        y, states = block.mix(x, given | states)
        rows.append(y[0, :, 0].T.float())
    return torch.cat(rows), states["memory"].float()


def off(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--decays", choices=NETS, help="by what memories decay (default: all)")
    options = parser.parse_args()
    tokens = options.tokens
    nets = {options.decays: NETS[options.decays]} if options.decays else NETS
    torch.set_num_threads(1)
    print("| decays by | left of the memory | tokens a call | last results | memory | plain |")
    print("|---|---|---:|---:|---:|---:|")
    for (kind, net), (name, left) in itertools.product(nets.items(), DECAYS.items()):
        if left[0] > 0.9999 and kind != "fixed":  # of what learns its decays
            continue
        module = net.original(left)
        h = torch.randn(tokens, D).half().float()
        exact, memory = net.expected(module, h)
        block = net.ours(module)
        for width in WIDTHS:
            given, kept = through(block, h, width)
            rounded = {"lost": lambda decay: delta_net.left(decay) - 1}
            with patch.multiple(delta_net, **rounded), patch.multiple(lightning, **rounded):
                _, plain = through(block, h, width)
            errors = off(given[-LAST:], exact[-LAST:]), off(kept, memory), off(plain, memory)
            found = " | ".join(f"{one:.1e}" for one in errors)
            print(f"| {kind} | {name} | {width} | {found} |", flush=True)


if __name__ == "__main__":
    main()
