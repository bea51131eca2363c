"""Expert functions one by one, and their dispatch by the host.

N = tokens, d = d_model, E = experts, G = experts of one function, P = tokens the golden shows each expert.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ane_moe.loop.buffers import by_channel
from ane_moe.loop.experts import ExpertDispatch, Group, expert_inputs, gate_name
from ane_moe.loop.figures import CallClock, PhaseFigures
from ane_moe.manifest import Manifest
from ane_moe.original.golden import Golden, LayerGolden
from ane_moe.runtime.interface import LoadedFunction
from ane_moe.verification.gate import judge
from ane_moe.verification.result import ShardResult
from ane_moe.verification.routing_parity import near_tie_flips

GATES = (1, 0.5, 0.25)          # exact in fp16, and different in neighbouring tokens
MASKED_TOKENS = 16              # shown to every expert, chosen or not


@dataclass(frozen=True)
class ExpertParity:
    """Rows for the expert functions of a conversion whose experts the host dispatches."""

    manifest: Manifest
    golden: Golden
    dispatch: ExpertDispatch
    min_cosine: float

    def functions(self, layer: int) -> Iterator[ShardResult]:
        """Every function of a layer's packages on tokens of the golden, gates included."""
        golden, table = self.golden.layers[layer], self.dispatch.layers[layer]
        for group in table.groups:
            for tokens in group.names:
                yield self._row(layer, group, tokens, *self._each_expert(group, golden, tokens))
        if table.shared and golden.ffn_input is not None:
            expected = np.zeros_like(golden.ffn_input) if golden.shared_output is None else golden.shared_output
            for tokens in table.shared.names:
                x = golden.ffn_input[:max(tokens, MASKED_TOKENS)]
                yield self._row(layer, table.shared, tokens, x, np.empty((0, len(x))), expected[:len(x)])

    def dispatched(self, layer: int, function: str, rows: list[int],
                   outputs: Mapping[str, np.ndarray]) -> Iterator[ShardResult]:
        """The dispatched sum for what the attention function gave for the golden's tokens `rows`: against the
        golden's delta, and against all experts computed and weighted, as masked routing does."""
        golden, table = self.golden.layers[layer], self.dispatch.layers[layer]
        assert golden.router_probs is not None and golden.router_indices is not None
        ffn_input, gates = outputs["ffn_input"].T, outputs["gates"].T
        total = np.zeros(ffn_input.shape, np.float32)
        self.dispatch.add(layer, self.dispatch.chosen(gates), ffn_input, gates, total, CallClock(PhaseFigures()))
        flipped = near_tie_flips(outputs["gates"], golden.router_probs[rows], golden.router_indices[rows])
        zeros, path = np.zeros_like(total.T), table.groups[0].path
        yield judge(path, "dispatch", layer, function, zeros, total.T, golden.ffn_delta[rows], self.min_cosine,
                    flipped)
        few = slice(0, MASKED_TOKENS)
        masked = sum(self._run(group, max(group.names), ffn_input.T[few], gates[list(group.experts)][:, few])
                     for group in table.all_groups)
        yield judge(path, "dispatch", layer, f"{function} against masked", zeros[few], total.T[few],
                    np.asarray(masked), self.min_cosine)

    def _each_expert(self, group: Group, golden: LayerGolden,
                     tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs `[n,d]`, gates `[G,n]` and expected outputs `[n,d]`: every expert of the group alone on its P tokens,
        again and again until the last call of `tokens` is full."""
        assert golden.ffn_input is not None and golden.expert_tokens is not None and golden.expert_outputs is not None
        shown = golden.expert_tokens.shape[1]
        pairs = len(group.experts) * shown
        order = np.arange(-(-pairs // tokens) * tokens) % pairs
        member, probe = order // shown, order % shown
        expert = np.array(group.experts)[member]
        gates = np.zeros((len(group.experts), len(order)))
        gates[member, np.arange(len(order))] = np.resize(GATES, len(order))
        outputs = golden.expert_outputs[expert, probe] * gates.sum(0)[:, None]
        return golden.ffn_input[golden.expert_tokens[expert, probe]], gates, outputs

    def _row(self, layer: int, group: Group, tokens: int, x: np.ndarray, gates: np.ndarray,
             expected: np.ndarray) -> ShardResult:
        y = self._run(group, tokens, x, gates)
        return judge(group.path, "experts", layer, group.names[tokens], np.zeros_like(expected), y,
                     expected.astype(np.float32), self.min_cosine)

    def _run(self, group: Group, tokens: int, x: np.ndarray, gates: np.ndarray) -> np.ndarray:
        """One function on `x [n,d]` under `gates [G,n]` in calls of `tokens`, the last one padded; `[n,d]` in fp32."""
        with self.dispatch.cache.hold(group.key(tokens)) as function:
            pieces = [self._call(function, group, tokens, x[first:first + tokens], gates[:, first:first + tokens])
                      for first in range(0, len(x), tokens)]
        return np.concatenate(pieces)

    def _call(self, function: LoadedFunction, group: Group, tokens: int, x: np.ndarray,
              gates: np.ndarray) -> np.ndarray:
        size = len(group.experts)
        features = {name: np.zeros(shape, np.float16)
                    for name, shape in expert_inputs(self.manifest, size, tokens).items()}
        by_channel(features["ffn_input"])[:, :len(x)] = x.T
        if size:
            by_channel(features[gate_name(size)])[:, :len(x)] = gates
        return by_channel(function.predict(features)["y"])[:, :len(x)].T.astype(np.float32)
