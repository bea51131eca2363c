"""Gated delta net: a matrix for each head in the place of a cache.

A call of one token is one step of the recurrence. A call of several is one chunk: what its tokens
write, U, is the solution of a triangular system, `U = (I + L)^-1 beta (V - decay S K)` (arXiv
2406.06484, section 3.2, and 2412.06464, section 3.3), and everything else is products and masks.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.jit import TracerWarning

from ane_moe.model.delta_net import DeltaNetConfig
from ane_moe.parts.activation import silu
from ane_moe.parts.experts import tree_sum
from ane_moe.parts.mixer import Mixer
from ane_moe.parts.norm import RmsNorm
from ane_moe.parts.projection import Projection
from ane_moe.parts.recent import advanced, joined
from ane_moe.parts.residual import vector
from ane_moe.parts.token_convolution import TokenConvolution

LENGTH_EPS = 1e-6  # transformers' `l2norm`
# Logarithms of decays are in sixteenths: sums of products have a resolution of 2^-16 on the engine,
# and a limit of 32,768, which the most of 146 tokens keep.
UNIT = 16
MOST = 14  # exp(-14) is below 2^-20
# Of the logarithm of a rate in these units; exp of more leaves fp16. Open ends become infinite
# constants.
RATES = (-16, 10)


class Decay(Projection):
    """The logarithm of what is left of a head's matrix, times -UNIT: `(1, d, 1, T) -> (1, H, 1,
    T)`, from 0 to UNIT MOST."""

    def __init__(self, d_model: int, heads: int):
        super().__init__(d_model, heads, bias=True)
        self.rate = vector(heads)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        rate = torch.exp((self.rate + math.log(UNIT)).clamp(*RATES))
        return (rate * softplus(super().forward(x))).clamp(0, UNIT * MOST)


class DeltaNet(Mixer):
    """`y = x + o(silu(z) * norm(S q))`, where S has taken in the token."""

    config: DeltaNetConfig
    decay: Projection
    one_trace = False

    def add_projections(self) -> None:
        c, m, d = self.config, self.config.mixer, self.config.d_model
        self.query = Projection(d, m.queries, rank=c.rank("query"))
        self.key = Projection(d, m.keys, rank=c.rank("key"))
        self.value = Projection(d, m.values, rank=c.rank("value"))
        self.add_gates()
        # Queries are not scaled by key_dim ** -0.5, which a norm takes out again but for its eps.
        self.value_norm = RmsNorm(m.value_dim, m.eps * m.key_dim, axis=2)
        self.o = Projection(m.values, d, rank=c.rank("o"))

    def add_gates(self) -> None:
        """Make the parameters of what decays, writes and leaves, and of the convolution."""
        c, m, d = self.config, self.config.mixer, self.config.d_model
        self.z = Projection(d, m.values, rank=c.rank("z"))
        self.beta = Projection(d, m.value_heads)
        self.decay = Decay(d, m.value_heads)
        self.conv = TokenConvolution(m.channels, 1, m.taps, bias=False)

    def mix(self, h: Tensor, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        m, explicit = self.config.mixer, self.config.explicit
        new = torch.cat([self.query(h), self.key(h), self.value(h)], dim=1)
        seen = joined("recent", new, m.history, inputs)
        mixed = silu(self.convolved(seen))
        q, k = self._queries_and_keys(mixed[:, : 2 * m.queries])
        v = mixed[:, 2 * m.queries :].reshape(1, m.value_heads, m.value_dim, -1)
        beta = torch.sigmoid(self.beta(h)).reshape(1, m.value_heads, 1, -1)
        decay, memory = self.decays(h), inputs["memory"]
        if "real" in inputs:  # padding neither decays nor writes
            beta, decay = beta * inputs["real"], decay * inputs["real"]
            given, change = chunk(memory, q, k, v, beta, decay)
        else:
            given, change = one_step(memory, q, k, v, beta, decay)
        kept = {
            "recent": advanced("recent", seen, "shift", inputs, explicit),
            "memory": memory + change if explicit else memory.add_(change),
        }
        return self.o(self.gated(given, h)), kept

    def convolved(self, seen: Tensor) -> Tensor:
        """`(1, C, 1, n + T)` to `(1, C, 1, T)`."""
        return self.conv(seen)

    def decays(self, h: Tensor) -> Tensor:
        """`(1, d, 1, T)` to `(1, H, 1, T)`, or one of each key channel, `(1, H, Dk, T)`."""
        return self.decay(h).reshape(1, self.config.mixer.value_heads, 1, -1)

    def _queries_and_keys(self, channels: Tensor) -> tuple[Tensor, Tensor]:
        """Of length 1, each for the value heads that share it: `(1, 2 Hk Dk, 1, T)` to two of `(1,
        H, Dk, T)`."""
        m = self.config.mixer
        heads = unit(channels.reshape(2 * m.key_heads, 1, m.key_dim, -1))
        shared = torch.ones(1, m.value_heads // m.key_heads, 1, 1, dtype=heads.dtype)
        both = (heads * shared).reshape(1, 2 * m.value_heads, m.key_dim, -1)
        return both[:, : m.value_heads], both[:, m.value_heads :]

    def gated(self, given: Tensor, h: Tensor) -> Tensor:
        """`(1, H, Dv, T)` and `(1, d, 1, T)` to `(1, H Dv, 1, T)`."""
        z = self.z(h)
        return torch.sigmoid(z) * self.normed(given) * z

    def normed(self, given: Tensor) -> Tensor:
        """`(1, H, Dv, T)` to `(1, H Dv, 1, T)`."""
        return self.value_norm(given).reshape(1, self.config.mixer.values, 1, -1)


def softplus(x: Tensor) -> Tensor:
    """`log(1 + exp(x))`, small results as exact as large ones: `log(1 + e)` is `2 artanh(e / (2 +
    e))`, here a polynomial within 4e-7 of it. The engine's own gives 0 from 10.4 on, and its
    logarithm errs by 7e-3 near 0, where slow decays are."""
    e = torch.exp(-x.abs())
    w = e / (e + 2)
    square = w * w
    twice = ((square * 0.342225 + 0.395901) * square + 0.66676) * square + 2
    return torch.relu(x) + w * twice


def unit(x: Tensor) -> Tensor:
    """`x / sqrt(sum(x^2) + eps)` over axis 2, by way of the largest as in RmsNorm."""
    root_eps = LENGTH_EPS**0.5
    largest = x.abs().amax(2, keepdim=True).clamp(min=root_eps)
    y = x / largest
    root = torch.full((1, 1, 1, 1), root_eps, dtype=x.dtype) / largest
    return y * torch.rsqrt((y * y).sum(2, keepdim=True) + root * root)


def left(decay: Tensor) -> Tensor:
    """What is left after a decay."""
    return torch.exp(decay * (-1 / UNIT))


def lost(decay: Tensor) -> Tensor:
    """`left(decay) - 1`, exact near 0 as well, where fp16 has no numbers between 1 and 1 - 2^-11:
    with t = tanh(x / 2), exp(x) - 1 is 2 t / (1 - t)."""
    t = torch.tanh(decay * (-0.5 / UNIT))
    return 2 * t / (1 - t)


def one_step(
    memory: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: what the matrices give for its query, `(1, H, Dv, 1)`, and the change of the
    `memory`, `(1, H, Dv, Dk)`. Queries and keys are `(1, H, Dk, 1)`, values `(1, H, Dv, 1)`,
    beta `(1, H, 1, 1)` and so the decay, or, by channel, `(1, H, Dk, 1)`."""
    written = beta * (v - memory @ (left(decay) * k))
    change = memory * lost(decay).transpose(2, 3) + written * k.transpose(2, 3)
    return (memory + change) @ q, change


def chunk(
    memory: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor
) -> tuple[Tensor, Tensor]:
    """`one_step` for T tokens, two or more, one after the other: `(1, H, Dv, T)`, and the change
    of the memory.

    Matrices over tokens, `(1, H, T, T)`, have the earlier token on axis 2. Each decay is the sum of
    what lies between two tokens, never a difference of sums: nothing cancels, and none is above 1.
    """
    tokens = token_count(v)
    with known():
        among = among_heads if int(decay.shape[2]) == 1 else among_channels
    of_keys, of_queries = among(q, k, decay, tokens)
    inverse = inverted(of_keys * beta, tokens)
    written = (beta * (v - memory @ (so_far(decay, tokens) * k))) @ inverse  # (1, H, Dv, T)
    return recalled(memory, q, k, written, of_queries, decay)


def recalled(
    memory: Tensor, q: Tensor, k: Tensor, written: Tensor, of_queries: Tensor, decay: Tensor
) -> tuple[Tensor, Tensor]:
    """What a chunk's queries find, `(1, H, Dv, T)`, and the change of the memory, once it is known
    what each token has `written` for its key."""
    tokens = token_count(written)
    given = memory @ (so_far(decay, tokens) * q) + written @ of_queries
    from_now = left(decay @ constant(np.tri(tokens, k=-1), decay))
    lasting = memory * lost(decay.sum(3, keepdim=True)).transpose(2, 3)
    return given, lasting + written @ (from_now * k).transpose(2, 3)


def so_far(decay: Tensor, tokens: int) -> Tensor:
    """What is left of the memory at each token."""
    return left(decay @ constant(np.tri(tokens).T, decay))


def among_heads(q: Tensor, k: Tensor, decay: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Products of keys with later keys, and with queries of the same token or later ones, times
    what is left of a head's matrix between the two: two matrices over tokens."""
    later = constant(np.tri(tokens, k=-1).T, k)  # 1 where axis 3 is after axis 2
    since = constant(np.tri(tokens).T, k)  # or the same token
    between = left((later * decay) @ since) * since
    rows = k.transpose(2, 3)  # (1, H, T, Dk)
    return (rows @ k) * between * later, (rows @ q) * between


def among_channels(q: Tensor, k: Tensor, decay: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """`among_heads` with a decay for each channel.

    Two tokens are in neighbouring blocks of just one size, 1, 2, 4, ..., and what is left from the
    one to the other is what is left at the border times what is left of that: each at most 1, so
    that a product that vanishes in fp16 is of what vanishes.
    """
    of_keys, of_queries = [], [constant(np.eye(tokens), k) * (k * q).sum(2, keepdim=True)]
    for size, corner in zip(sizes(tokens), corner_masks(tokens), strict=True):
        near, apart = left(decay @ constant(to_border(tokens, size), k)), constant(corner, k)
        keys = near * k
        rows = keys.transpose(2, 3)
        of_keys.append((rows @ keys) * apart)
        of_queries.append((rows @ (near * q)) * apart)
    return tree_sum(of_keys), tree_sum(of_queries)


def to_border(tokens: int, size: int) -> np.ndarray:
    """For blocks of `size` tokens, by token of the column: 1 for the tokens after it in its block
    or, in the second of a pair of blocks, for those up to it and itself."""
    place = np.arange(tokens)
    block, until = place // size, place[:, None] <= place
    return (block[:, None] == block) & (until == (block % 2 == 1))


def inverted(above: Tensor, tokens: int) -> Tensor:
    """`(I + above)^-1` of what is zero but above the diagonal, `(1, H, T, T)`.

    From blocks on the diagonal to blocks twice as large, whose corner is `-P C Q`: P and Q are the
    two inverses, C the corner of `above`. All values on the way are of inverses; a series of powers
    of `above` would pass binomials of T where keys are alike.
    """
    corners = [constant(corner, above) for corner in corner_masks(tokens)]
    inverse = constant(np.eye(tokens), above)
    if corners:
        inverse = inverse - above * corners[0]
    for corner in corners[1:]:
        inverse = inverse - inverse @ (above * corner) @ inverse
    return inverse


def sizes(tokens: int) -> list[int]:
    """1, 2, 4, ..., as long as there is a second block."""
    return [2**n for n in range((tokens - 1).bit_length())]


def corner_masks(tokens: int) -> list[np.ndarray]:
    """For blocks of each of the `sizes`: 1 where the token of the row is in one of a pair of
    blocks, and that of the column in the next one."""
    place, masks = np.arange(tokens), []
    for size in sizes(tokens):
        block = place // size
        masks.append((block[:, None] + 1 == block) & (block % 2 == 1))
    return masks


def constant(values: np.ndarray, like: Tensor) -> Tensor:
    """A matrix of the graph, `(1, 1, T, T)`."""
    with known():
        return torch.from_numpy(values.astype(np.float32)).to(like.dtype)[None, None]


def token_count(x: Tensor) -> int:
    """T, as a number of the graph (`Block.one_trace`)."""
    with known():
        return int(x.shape[3])


@contextmanager
def known() -> Iterator[None]:
    """What a trace may hold for constant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracerWarning)
        yield
