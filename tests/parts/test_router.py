"""Exact top-k in arithmetic, against torch's stable sort; router gates against Hugging Face's
routers."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ane_moe.model.spec import RouterSpec
from ane_moe.parts.router import Router, top_k_mask


def lowest_index_top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """The k largest of axis 0, the lowest index winning ties."""
    order = np.argsort(-logits.astype(np.float64), axis=0, kind="stable")[:k]
    mask = np.zeros(logits.shape, np.float32)
    np.put_along_axis(mask, order, 1, axis=0)
    return mask


fp16_logits = hnp.arrays(
    np.float16,
    st.tuples(st.integers(2, 70), st.integers(1, 4)),
    elements=st.one_of(
        st.sampled_from([0.0, 1.0, -1.0, 2.0]),  # many ties
        st.floats(-200, 200, width=16),
        st.floats(-(2**-14), 2**-14, width=16),  # subnormals apart by 2^-24
    ),
)


@settings(deadline=None, max_examples=300)
@given(logits=fp16_logits, data=st.data())
def test_top_k_picks_exactly_k_and_the_lowest_index_of_equals(logits, data):
    experts, tokens = logits.shape
    k = data.draw(st.integers(1, min(experts, 8)))
    x = torch.from_numpy(logits).reshape(1, experts, 1, tokens)
    for dtype in (torch.float16, torch.float32):
        mask = top_k_mask(x.to(dtype), k, experts)
        np.testing.assert_array_equal(
            mask.reshape(experts, tokens).float().numpy(), lowest_index_top_k(logits, k)
        )


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**31), renorm=st.booleans())
def test_gates_are_the_top_k_softmax(seed, renorm):
    generator = torch.Generator().manual_seed(seed)
    spec = RouterSpec(experts=12, k=3, renorm=renorm)
    router = Router(20, spec)
    router.weight.data = torch.randn(router.weight.shape, generator=generator)
    x = torch.randn(1, 20, 1, 5, generator=generator)
    with torch.no_grad():
        gates = router.gates(x, {})[0][0, :, 0].T  # (T, E)
    probabilities = torch.softmax(x[0, :, 0].T @ router.weight.data[:, :, 0, 0].T, dim=-1)
    weights, chosen = torch.topk(probabilities, 3)
    if renorm:
        weights = weights / weights.sum(-1, keepdim=True)
    expected = torch.zeros_like(gates).scatter(1, chosen, weights)
    torch.testing.assert_close(gates, expected, atol=1e-6, rtol=1e-5)


def test_soft_gates_are_the_whole_softmax():
    router = Router(20, RouterSpec(experts=12, k=3), soft=True)
    torch.nn.init.normal_(router.weight)
    with torch.no_grad():
        gates, _ = router.gates(torch.randn(1, 20, 1, 5), {})
    assert (gates > 0).all()
    torch.testing.assert_close(gates.sum(1), torch.ones(1, 1, 5))
