"""What each expert of a Hugging Face layer computes alone, by Hugging Face's own modules.

N = tokens, d = d_model, E = experts, k = experts per token, P = tokens each expert is shown.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ane_moe.original.golden import LayerGolden
from ane_moe.original.tap import TappedLayer, first_of

PROBES = 4
ENTERING_GATE = 0.5  # where gates multiply what enters experts: outputs are not proportional to it


@torch.no_grad()
def with_experts(parts: TappedLayer, golden: LayerGolden) -> LayerGolden:
    """The golden of a loaded decoder layer with what its experts take and give one by one added;
    unchanged where the layer has none."""
    experts, block, scale = parts.experts, parts.block, parts.added_scale
    if experts is None or block is None or golden.router_indices is None:
        return golden
    ffn_input = parts.ffn_norm(torch.from_numpy(golden.read_by_ffn)[None])
    flat = (parts.latent(ffn_input) if parts.latent else ffn_input)[0]
    shared = torch.zeros(1)
    if block is not experts and parts.latent is None:  # else the latter alone add up
        beside = [torch.from_numpy(carried)[None] for carried in golden.carried_in.values()]
        silent = experts.register_forward_hook(lambda _, args, output: torch.zeros_like(output))
        with parts.without_norm_after():
            inside: Any = first_of(block(ffn_input, *beside)).reshape(ffn_input.shape)
        silent.remove()
        shared = scale * (inside + parts.shared(ffn_input))[0]
    holder: Any = experts.router if parts.taps.sorted_block else experts
    count: Any = getattr(holder, "num_routed_experts", None) or holder.num_experts
    tokens = _shown(golden.router_indices, count)
    each = torch.arange(len(tokens)).repeat_interleave(tokens.shape[1])[:, None]
    # A second choice of no weight: LongcatFlashExperts has no form of one alone.
    both, weights = torch.cat([each, (each + 1) % len(tokens)], 1), torch.tensor([[1.0, 0.0]])
    given = flat[tokens.reshape(-1)]
    by_gate = parts.taps.sorted_inputs
    if by_gate:
        outputs = scale * experts(given * ENTERING_GATE)
    elif parts.taps.sorted_block:
        outputs = scale * _of_sorted(experts, given, each[:, 0])
    else:
        outputs = scale * experts(given, both, weights.expand(len(each), 2))
    return replace(
        golden,
        ffn_input=flat.numpy(),
        expert_tokens=tokens,
        expert_outputs=outputs.reshape(*tokens.shape, -1).numpy(),
        shared_output=shared.numpy() if bool(shared.any()) else None,
        expert_gate=np.array([ENTERING_GATE], np.float32) if by_gate else None,
    )


def _of_sorted(block: Any, given: torch.Tensor, each: torch.Tensor) -> torch.Tensor:
    """What a block gives for tokens `[P,d]`, in the order of the experts that they are given to, by
    gates of 1 (`JetMoeMoE`)."""
    sizes = torch.bincount(each, minlength=block.router.num_experts).tolist()
    routing = (None, torch.arange(len(given)), torch.ones(len(given)), sizes, None)
    hook = block.router.register_forward_hook(lambda *_: routing)
    try:
        return block(given[None])[0]
    finally:
        hook.remove()


def _shown(chosen: np.ndarray, experts: int) -> np.ndarray:
    """Tokens for each expert, int32 `[E,P]`: of those that chose it in `chosen [N,k]` the first,
    else any."""
    count = min(PROBES, len(chosen))
    others = np.linspace(0, len(chosen) - 1, count).astype(int)
    rows = [
        np.concatenate([np.flatnonzero((chosen == expert).any(1)), others])[:count]
        for expert in range(experts)
    ]
    return np.stack(rows).astype(np.int32)
