"""The attention block against Hugging Face's own layers: cache by mask, chunks, windows, norms,
RoPE."""

import dataclasses

import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import apply_rotary_pos_emb

from ane_moe.model.attention import AttentionConfig
from ane_moe.model.port import shapes_of
from ane_moe.model.spec import GqaSpec, NormSpec
from ane_moe.parts.attention import Attention
from ane_moe.parts.block import MASKED
from ane_moe.parts.rope import rotate

SLOTS, D_MODEL = 32, 24
MIXER = GqaSpec(heads=6, kv_heads=2, head_dim=8, scale=8**-0.5, rope=None)
CONFIG = AttentionConfig(D_MODEL, NormSpec(eps=1e-6), MIXER, rotary=0, slots=SLOTS)


def random_block(config: AttentionConfig) -> Attention:
    torch.manual_seed(0)
    block = Attention(config).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return block


def empty_cache() -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name, shape in shapes_of(CONFIG.states).items()}


def chunk_inputs(x: torch.Tensor, first: int, padded: int | None = None) -> dict[str, torch.Tensor]:
    """Inputs for the tokens `x` (1, d, 1, T) at positions first, first + 1, ..., padded to `padded`
    tokens."""
    tokens, total = x.shape[3], padded or x.shape[3]
    write, mask = torch.zeros(1, 1, total, SLOTS), torch.full((1, 1, total, SLOTS), MASKED)
    mask[..., 0] = 0
    for t in range(tokens):
        write[0, 0, t, first + t] = 1
        mask[0, 0, t, : first + t + 1] = 0
    x = torch.nn.functional.pad(x, (0, total - tokens))
    return {"x": x, "mask": mask, "write": write, "keep": 1 - write.sum(2, keepdim=True)}


def plain(block: Attention, x: torch.Tensor) -> torch.Tensor:
    """The whole sequence at once, by torch's own attention."""
    m = block.config.mixer
    h = block.norm(x)
    q, k, v = (
        p(h)[0, :, 0].T.reshape(-1, n, m.head_dim).transpose(0, 1)[None]
        for p, n in ((block.q, m.heads), (block.k, m.kv_heads), (block.v, m.kv_heads))
    )
    o = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=m.scale, enable_gqa=True
    )
    return x + block.o(o[0].transpose(0, 1).reshape(x.shape[3], -1).T[None, :, None])


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[1] * 7, [3, 3, 1], [7]])
def test_tokens_in_any_chunks_equal_full_causal_attention(chunks):
    block, x = random_block(CONFIG), torch.randn(1, D_MODEL, 1, 7)
    cache = empty_cache()
    outputs, first = [], 0
    for size in chunks:
        outputs.append(block(**chunk_inputs(x[..., first : first + size], first), **cache)["y"])
        first += size
    torch.testing.assert_close(torch.cat(outputs, 3), plain(block, x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_tokens_change_neither_outputs_nor_cache():
    x = torch.randn(1, D_MODEL, 1, 3)
    block, padded, bare = random_block(CONFIG), empty_cache(), empty_cache()
    y = block(**chunk_inputs(x, 0, padded=5), **padded)["y"]
    torch.testing.assert_close(y[..., :3], block(**chunk_inputs(x, 0), **bare)["y"])
    torch.testing.assert_close(padded, bare)


@torch.no_grad()
def test_explicit_caches_equal_the_state():
    x = torch.randn(1, D_MODEL, 1, 3)
    inside, outside = random_block(CONFIG), random_block(dataclasses.replace(CONFIG, explicit=True))
    outside.load_state_dict(inside.state_dict(), strict=False)
    state = empty_cache()
    result = outside(**chunk_inputs(x, 0), **empty_cache())
    torch.testing.assert_close(result["y"], inside(**chunk_inputs(x, 0), **state)["y"])
    torch.testing.assert_close(result["v_cache_out"], state["v_cache"])


def test_rotation_is_hugging_faces_half_split_form():
    heads, angles = torch.randn(1, 4, 8, 5), torch.randn(1, 5, 4)  # (1, H, D, T), (1, T, r)
    cos, sin = angles.cos(), angles.sin()
    full = (torch.cat([cos, cos], -1), torch.cat([sin, sin], -1))
    expected, _ = apply_rotary_pos_emb(heads.transpose(2, 3), heads.transpose(2, 3), *full)
    turned = rotate(
        heads, cos.transpose(1, 2)[None], sin.transpose(1, 2)[None], pairs=4, head_dim=8
    )
    torch.testing.assert_close(turned, expected.transpose(2, 3))


def test_channels_beyond_the_rotary_ones_pass_through():
    heads, ones = torch.randn(1, 4, 8, 5), torch.ones(1, 1, 2, 5)
    turned = rotate(heads, 0 * ones, ones, pairs=2, head_dim=8)
    torch.testing.assert_close(turned[:, :, 4:], heads[:, :, 4:])
    torch.testing.assert_close(turned[:, :, :2], -heads[:, :, 2:4])
