"""What fp16 costs Mamba-2 over a long text: our part, rounded to fp16 after each operation, beside
transformers' own module in fp32 with the same weights.

    python scripts/measure_mamba2.py [--tokens 2048]

Errors are those of scripts/measure_delta_net.py.
"""

import argparse
import math
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import DynamicCache
from transformers.models.granitemoehybrid.configuration_granitemoehybrid import (
    GraniteMoeHybridConfig,
)
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import (
    GraniteMoeHybridMambaLayer,
)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ane_moe.model.mamba2 import Mamba2Config, Mamba2Spec  # noqa: E402
from ane_moe.model.spec import NormSpec  # noqa: E402
from ane_moe.parts import mamba2  # noqa: E402
from ane_moe.parts.unbound import build_unbound  # noqa: E402
from scripts.measure_delta_net import DECAYS, LAST, WIDTHS, off, through  # noqa: E402

D = 256
SPEC = Mamba2Spec(heads=4, head_dim=64, groups=1, state=128, taps=4, eps=1e-5)
CONFIG = GraniteMoeHybridConfig(
    hidden_size=D,
    mamba_n_heads=SPEC.heads,
    mamba_d_head=SPEC.head_dim,
    mamba_d_state=SPEC.state,
    mamba_expand=1,
    rms_norm_eps=SPEC.eps,
    layer_types=["linear_attention"],
    num_hidden_layers=1,
)
PARTS = {"z": SPEC.inner, "u": SPEC.inner, "b": SPEC.shared, "c": SPEC.shared, "step": SPEC.heads}


def original(left: tuple[float, ...]) -> GraniteMoeHybridMambaLayer:
    """transformers' module with random weights that fp16 holds exactly."""
    torch.manual_seed(0)
    module = GraniteMoeHybridMambaLayer(CONFIG, 0).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, D**-0.5)
        module.conv1d.weight.normal_(0, 0.5)
        module.norm.weight.fill_(1)
        module.D.fill_(1)
        # exp(A_log) softplus(dt_bias) is the decay; softplus of -4 is 0.018.
        small = math.log1p(math.exp(-4))
        module.dt_bias.fill_(-4)
        module.A_log.copy_(torch.tensor([math.log(-math.log(one) / small) for one in left]))
        for parameter in module.parameters():
            parameter.copy_(parameter.half())
    return module


def ours(module: GraniteMoeHybridMambaLayer):
    """Our part with its weights, in fp16."""
    block = build_unbound(Mamba2Config(D, NormSpec(), SPEC, slots=32, explicit=True))
    block = block.to_empty(device="cpu").half().eval()
    rows = module.in_proj.weight.split(list(PARTS.values()))
    values = {
        **{f"{name}.weight": part for name, part in zip(PARTS, rows, strict=True)},
        "step.offset": module.dt_bias,
        "step.decay": module.A_log,
        "skip.weight": module.D,
        "conv.weight": module.conv1d.weight,
        "conv.bias": module.conv1d.bias,
        "value_norm.weight": module.norm.weight,
        "o.weight": module.out_proj.weight,
        "norm.weight": torch.ones(D),
    }
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.copy_(values[name].reshape(parameter.shape))
    return block


@torch.no_grad()
def expected(module, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What transformers' module gives in fp32, `(N, d)`, and its memory in the end."""
    cache = DynamicCache(config=CONFIG)
    given = module(h[None], cache_params=cache)[0]
    return given, cache.get_recurrent_state(0, state_idx=0)


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
            with patch.object(mamba2, "lost", lambda decay: mamba2.left(decay) - 1):
                _, plain = through(block, h, width)
            errors = off(given[-LAST:], exact[-LAST:]), off(kept, memory), off(plain, memory)
            print(f"| {name} | {width} | " + " | ".join(f"{one:.1e}" for one in errors) + " |")


if __name__ == "__main__":
    main()
