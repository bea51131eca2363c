"""Recurrent layers, against PyTorch's and, for what that lacks, the documented equations."""

from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from op_harness import assert_same, run
from strategies import values

STEPS, BATCH, INPUTS, HIDDEN = 4, 3, 5, 2
ACTIVATIONS = {
    "tanh": np.tanh,
    "scaled_tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "hard_sigmoid": lambda x: np.clip(0.2 * x + 0.5, 0, 1),
    "relu": lambda x: np.maximum(x, 0),
    "linear": lambda x: x,
}
ORDER = {"lstm": [0, 1, 3, 2], "gru": [0, 2, 1], "rnn": [0]}  # our gates among those of PyTorch


def weights(layer: torch.nn.Module, kind: str, back: bool = False) -> dict[str, np.ndarray]:
    """weight_ih, weight_hh and both biases of a layer of PyTorch, its gates in Core ML's order."""

    def ordered(name: str) -> np.ndarray:
        gates = (
            getattr(layer, f"{name}_l0{'_reverse' if back else ''}")
            .detach()
            .chunk(len(ORDER[kind]))
        )
        return torch.cat([gates[i] for i in ORDER[kind]]).numpy()

    return {name: ordered(name) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}


def parameters(layer: torch.nn.Module, kind: str) -> dict[str, Any]:
    given = weights(layer, kind)
    return {
        "weight_ih": given["weight_ih"],
        "weight_hh": given["weight_hh"],
        "bias": given["bias_ih"] + given["bias_hh"],
    }


def states(layer: torch.nn.Module, seed: int, directions: int = 1) -> tuple[torch.Tensor, ...]:
    count = 2 if isinstance(layer, torch.nn.LSTM) else 1
    return tuple(
        torch.from_numpy(values((directions, BATCH, HIDDEN), np.float32, seed + i))
        for i in range(count)
    )


def expected(
    layer: torch.nn.Module, x: np.ndarray, given: tuple[torch.Tensor, ...]
) -> tuple[np.ndarray, ...]:
    """PyTorch's (outputs, last state, ...), directions side by side."""
    with torch.no_grad():
        y, last = layer(torch.from_numpy(x), given if len(given) > 1 else given[0])
    last = last if isinstance(last, tuple) else (last,)
    return y.numpy(), *(torch.cat(list(state), -1).numpy() for state in last)


@pytest.mark.parametrize(
    "kind, module",
    [
        ("lstm", lambda: torch.nn.LSTM(INPUTS, HIDDEN)),
        ("rnn", lambda: torch.nn.RNN(INPUTS, HIDDEN)),
        ("rnn", lambda: torch.nn.RNN(INPUTS, HIDDEN, nonlinearity="relu")),
    ],
)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_layer_of_one_direction_agrees_with_pytorch(
    kind: str, module: Any, direction: str, dtype: type
) -> None:
    torch.manual_seed(0)
    layer = module()
    x, start = values((STEPS, BATCH, INPUTS), np.float32, 1), states(layer, 2)
    y, *last = expected(layer, x[::-1].copy() if direction == "reverse" else x, start)
    tensors = dict(
        zip(("x", "initial_h", "initial_c"), (x, *(s[0].numpy() for s in start)), strict=False)
    )
    given = {name: value.astype(dtype) for name, value in parameters(layer, kind).items()}
    for whole in (True, False):
        params = given | {
            "direction": direction,
            "output_sequence": whole,
            "activation": getattr(layer, "nonlinearity", "tanh"),
        }
        out = run(kind, {name: value.astype(dtype) for name, value in tensors.items()}, params)
        for ours, theirs in zip(out, (y if whole else y[-1:], *last), strict=True):
            assert ours.dtype == dtype
            assert_same(
                ours,
                theirs,
                rtol=1e-4 if dtype is np.float32 else 2e-2,
                atol=1e-5 if dtype is np.float32 else 4e-3,
            )


@pytest.mark.parametrize("whole", [True, False])
def test_a_bidirectional_lstm_agrees_with_pytorch(whole: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.LSTM(INPUTS, HIDDEN, bidirectional=True)
    x, start = values((STEPS, BATCH, INPUTS), np.float32, 1), states(layer, 2, directions=2)
    y, *last = expected(layer, x, start)
    back = weights(layer, "lstm", back=True)
    params = parameters(layer, "lstm") | {
        "weight_ih_back": back["weight_ih"],
        "weight_hh_back": back["weight_hh"],
        "bias_back": back["bias_ih"] + back["bias_hh"],
        "direction": "bidirectional",
        "output_sequence": whole,
    }
    h, c = (torch.cat(list(state), -1).numpy() for state in start)
    out = run("lstm", {"x": x, "initial_h": h, "initial_c": c}, params)
    final = np.concatenate([y[-1:, :, :HIDDEN], y[:1, :, HIDDEN:]], -1)
    for ours, theirs in zip(out, (y if whole else final, *last), strict=True):
        assert_same(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_gru_that_resets_after_the_product_agrees_with_pytorch() -> None:
    torch.manual_seed(0)
    layer = torch.nn.GRU(INPUTS, HIDDEN)
    x, start = values((STEPS, BATCH, INPUTS), np.float32, 1), states(layer, 2)
    y, last = expected(layer, x, start)
    given = weights(layer, "gru")
    out = run(
        "gru",
        {"x": x, "initial_h": start[0][0].numpy()},
        {
            "weight_ih": given["weight_ih"],
            "weight_hh": given["weight_hh"],
            "bias": given["bias_hh"],
            "input_bias": given["bias_ih"],
            "reset_after": True,
            "output_sequence": True,
        },
    )
    assert_same(out[0], y, rtol=1e-4, atol=1e-5)
    assert_same(out[1], last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", [ct.target.iOS15, ct.target.iOS17, ct.target.iOS18])
@pytest.mark.parametrize("gate, act", [("sigmoid", "tanh"), ("tanh", "sigmoid")])
def test_a_gru_that_resets_before_the_product_follows_its_equations(
    target: Any, gate: str, act: str
) -> None:
    x, h = values((STEPS, BATCH, INPUTS), np.float32, 0), values((BATCH, HIDDEN), np.float32, 1)
    w, u = (
        values((3 * HIDDEN, INPUTS), np.float32, 2, 0.5),
        values((3 * HIDDEN, HIDDEN), np.float32, 3, 0.5),
    )
    b = values((3 * HIDDEN,), np.float32, 4)
    (w_r, w_o, w_z), (u_r, u_o, u_z), (b_r, b_o, b_z) = (
        np.split(part.astype(np.float64), 3) for part in (w, u, b)
    )
    state, steps, gates, new = h.astype(np.float64), [], ACTIVATIONS[gate], ACTIVATIONS[act]
    for given in x[::-1]:
        r = gates(given @ w_r.T + state @ u_r.T + b_r)
        z = gates(given @ w_z.T + state @ u_z.T + b_z)
        state = (1 - z) * new(given @ w_o.T + (r * state) @ u_o.T + b_o) + z * state
        steps.append(state)
    out = run(
        "gru",
        {"x": x, "initial_h": h},
        {
            "weight_ih": w,
            "weight_hh": u,
            "bias": b,
            "direction": "reverse",
            "output_sequence": True,
            "recurrent_activation": gate,
            "activation": act,
        },
        target,
    )
    assert_same(out[0], np.stack(steps), rtol=1e-4, atol=1e-5)
    assert_same(out[1], state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_an_lstm_with_peepholes_and_a_clipped_cell_follows_its_equations(
    activation: str, clip: float | None
) -> None:
    x = values((STEPS, BATCH, INPUTS), np.float32, 0)
    h, c = (values((BATCH, HIDDEN), np.float32, seed) for seed in (1, 2))
    w, u = (
        values((4 * HIDDEN, INPUTS), np.float32, 3, 0.5),
        values((4 * HIDDEN, HIDDEN), np.float32, 4, 0.5),
    )
    p = values((3 * HIDDEN,), np.float32, 5)
    p_i, p_f, p_o = np.split(p.astype(np.float64), 3)
    act, sigmoid = ACTIVATIONS[activation], ACTIVATIONS["sigmoid"]
    state, cell = h.astype(np.float64), c.astype(np.float64)
    for given in x:
        i, f, o, z = np.split(given @ w.T.astype(np.float64) + state @ u.T, 4, -1)
        cell = sigmoid(f + cell * p_f) * cell + sigmoid(i + cell * p_i) * act(z)
        cell = cell if clip is None else np.clip(cell, -clip, clip)
        state = sigmoid(o + cell * p_o) * np.tanh(cell)
    params = {"weight_ih": w, "weight_hh": u, "peephole": p, "cell_activation": activation}
    out = run(
        "lstm",
        {"x": x, "initial_h": h, "initial_c": c},
        params | ({} if clip is None else {"clip": np.float32(clip)}),
    )
    for ours, theirs in zip(out, (state[None], state, cell), strict=True):
        assert_same(ours, theirs, rtol=1e-4, atol=1e-5)


def test_fp16_arithmetic_rounds_the_state_at_every_step() -> None:
    torch.manual_seed(0)
    layer = torch.nn.RNN(INPUTS, HIDDEN)
    x, h = values((STEPS, BATCH, INPUTS), np.float32, 1), np.zeros((BATCH, HIDDEN), np.float32)
    (exact, _), (narrow, _) = (
        run("rnn", {"x": x, "initial_h": h}, parameters(layer, "rnn"), precision=precision)
        for precision in ("fp32", "fp16")
    )
    assert np.array_equal(narrow, narrow.astype(np.float16)) and not np.array_equal(exact, narrow)
    np.testing.assert_allclose(narrow, exact, atol=5e-3)
