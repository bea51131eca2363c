"""Recurrent layers. Legend: S = steps, B = batch, I = inputs, H = hidden units, G = gates.

Semantics are those of coremltools' op documentation, and of its own tests where that leaves a case
open: which value `clip` bounds, what the activations' constants are, and that `reverse` gives its
steps in the order it takes them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ane_moe.runtime.reference.ops.arithmetic import Arithmetic
from ane_moe.runtime.reference.ops.table import Kernel, Op

Activation = Callable[[Tensor], Tensor]


def _hard_sigmoid(x: Tensor) -> Tensor:
    return torch.clamp(0.2 * x + 0.5, 0, 1)


ACTIVATIONS: dict[str, Activation] = {
    "tanh": torch.tanh,
    "scaled_tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "hard_sigmoid": _hard_sigmoid,
    "sigmoid_hard": _hard_sigmoid,
    "linear": lambda x: x,
}


def _activation(name: str) -> Activation:
    if name.lower() not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name}")
    return ACTIVATIONS[name.lower()]


def _ordered(x: Tensor, direction: str) -> Tensor:
    """`x` `[S,B,I]` in the order its steps are taken."""
    if direction not in ("forward", "reverse"):
        raise ValueError(f"unknown direction {direction}")
    return x.flip(0) if direction == "reverse" else x


def _projected(arith: Arithmetic, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x` `[..,I]` times `weight` `[G*H,I]`, `[..,G*H]`."""
    y = arith.round(arith.matmul(x, weight.transpose(0, 1)))
    return y if bias is None else arith.round(y + bias)


def _sequence(steps: list[Tensor], whole: bool) -> Tensor:
    """`[S,B,H]`, or `[1,B,H]` of the last step."""
    return torch.stack(steps if whole else steps[-1:])


def _rnn(
    arith: Arithmetic,
    direction: str = "forward",
    output_sequence: bool = False,
    activation: str = "tanh",
) -> Kernel:
    act = _activation(activation)

    def kernel(
        x: Tensor, h: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        steps = []
        for given in _projected(arith, _ordered(x, direction), weight_ih, bias):
            h = arith.round(act(arith.round(given + _projected(arith, h, weight_hh, None))))
            steps.append(h)
        return _sequence(steps, output_sequence), h

    return kernel


def _gru(
    arith: Arithmetic,
    direction: str = "forward",
    output_sequence: bool = False,
    recurrent_activation: str = "sigmoid",
    activation: str = "tanh",
    reset_after: bool = False,
) -> Kernel:
    """Gates in the order reset, output, update."""
    gate, act = _activation(recurrent_activation), _activation(activation)

    def kernel(
        x: Tensor,
        h: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias: Tensor | None,
        input_bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        biases = bias if bias is not None else weight_hh.new_zeros(weight_hh.shape[0])
        (w_r, w_o, w_z), (b_r, b_o, b_z) = weight_hh.chunk(3), biases.chunk(3)
        steps = []
        for given in _projected(arith, _ordered(x, direction), weight_ih, input_bias):
            x_r, x_o, x_z = given.chunk(3, dim=-1)
            r = arith.round(gate(arith.round(x_r + _projected(arith, h, w_r, b_r))))
            z = arith.round(gate(arith.round(x_z + _projected(arith, h, w_z, b_z))))
            recurrent = (
                r * _projected(arith, h, w_o, b_o)
                if reset_after
                else _projected(arith, r * h, w_o, b_o)
            )
            o = arith.round(act(arith.round(x_o + arith.round(recurrent))))
            h = arith.round((1 - z) * o + z * h)
            steps.append(h)
        return _sequence(steps, output_sequence), h

    return kernel


def _gru_with_one_bias(
    arith: Arithmetic,
    direction: str = "forward",
    output_sequence: bool = False,
    recurrent_activation: str = "sigmoid",
    activation: str = "tanh",
) -> Kernel:
    kernel = _gru(arith, direction, output_sequence, recurrent_activation, activation)
    return lambda *given: kernel(*given, None)


def _lstm(
    arith: Arithmetic,
    direction: str = "forward",
    output_sequence: bool = False,
    recurrent_activation: str = "sigmoid",
    cell_activation: str = "tanh",
    activation: str = "tanh",
    clip: float | None = None,
) -> Kernel:
    """Gates in the order input, forget, output, cell; peepholes of the first three."""
    gate, cell, act = (
        _activation(name) for name in (recurrent_activation, cell_activation, activation)
    )

    def one_way(
        x: Tensor,
        h: Tensor,
        c: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias: Tensor | None,
        peephole: Tensor | None,
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        p_i, p_f, p_o = peephole.chunk(3) if peephole is not None else (None, None, None)
        steps = []
        for given in _projected(arith, x, weight_ih, bias):
            i, f, o, z = arith.round(given + _projected(arith, h, weight_hh, None)).chunk(4, dim=-1)
            i, f = (
                arith.round(gate(_seen(arith, value, c, p))) for value, p in ((i, p_i), (f, p_f))
            )
            c = arith.round(arith.round(f * c) + arith.round(i * arith.round(cell(z))))
            c = c if clip is None else c.clamp(-clip, clip)
            o = arith.round(gate(_seen(arith, o, c, p_o)))
            h = arith.round(o * arith.round(act(c)))
            steps.append(h)
        return steps, h, c

    def kernel(
        x: Tensor,
        h: Tensor,
        c: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias: Tensor | None,
        peephole: Tensor | None,
        weight_ih_back: Tensor | None,
        weight_hh_back: Tensor | None,
        bias_back: Tensor | None,
        peephole_back: Tensor | None,
    ) -> tuple[Tensor, ...]:
        if direction != "bidirectional":
            steps, h, c = one_way(
                _ordered(x, direction), h, c, weight_ih, weight_hh, bias, peephole
            )
            return _sequence(steps, output_sequence), h, c
        if weight_ih_back is None or weight_hh_back is None:
            raise ValueError("a bidirectional lstm needs weight_ih_back and weight_hh_back")
        (h_on, h_back), (c_on, c_back) = h.chunk(2, dim=-1), c.chunk(2, dim=-1)
        on, *last_on = one_way(x, h_on, c_on, weight_ih, weight_hh, bias, peephole)
        back, *last_back = one_way(
            x.flip(0), h_back, c_back, weight_ih_back, weight_hh_back, bias_back, peephole_back
        )
        both = [_sequence(on, output_sequence), _sequence(back, output_sequence).flip(0)]
        return torch.cat(both, -1), *(
            torch.cat(pair, -1) for pair in zip(last_on, last_back, strict=True)
        )

    return kernel


def _seen(arith: Arithmetic, gate: Tensor, c: Tensor, peephole: Tensor | None) -> Tensor:
    """A gate's input with what it sees of the cell."""
    return gate if peephole is None else arith.round(gate + arith.round(c * peephole))


ONE_WAY = "x initial_h weight_ih weight_hh bias?"
BOTH_WAYS = (
    "x initial_h initial_c weight_ih weight_hh bias? peephole? "
    "weight_ih_back? weight_hh_back? bias_back? peephole_back?"
)
ORDER = "`reverse` gives its steps in the order it takes them"

OPS = (
    Op("rnn", _rnn, ONE_WAY, note=ORDER),
    Op("gru", _gru_with_one_bias, ONE_WAY, note=ORDER),
    Op("gru", _gru, f"{ONE_WAY} input_bias?", since=18),
    Op("lstm", _lstm, BOTH_WAYS, note=f"{ORDER}; clip bounds the cell state"),
)
