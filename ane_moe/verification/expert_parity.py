"""Expert functions one by one, and their dispatch by the host.

N = tokens, d = d_model, E = experts, G = experts of one function, P = tokens the golden shows each
expert.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from ane_moe.loop.buffers import by_channel
from ane_moe.loop.experts import ExpertDispatch, Group, Scratch
from ane_moe.loop.figures import CallClock, PhaseFigures
from ane_moe.model.port import FFN_INPUT, GATES
from ane_moe.original.golden import Golden, LayerGolden
from ane_moe.runtime.interface import LoadedFunction
from ane_moe.verification.gate import judge
from ane_moe.verification.result import ShardResult

EXAMPLE_GATES = (1, 0.5, 0.25)  # exact in fp16, and different in neighbouring tokens
MASKED_TOKENS = 16  # shown to every expert, chosen or not


@dataclass(frozen=True)
class ExpertParity:
    """Rows for the expert functions of a conversion whose experts the host dispatches."""

    golden: Golden
    dispatch: ExpertDispatch
    min_cosine: float
    few: bool = False  # the first, the middle and the last function of a layer only
    _scratch: Scratch = field(default_factory=Scratch)

    def functions(self, layer: int) -> Iterator[ShardResult]:
        """Every function of a layer's packages on tokens of the golden, gates included."""
        golden, table = self.golden.layers[layer], self.dispatch.layers[layer]
        for group in self._shown(table.groups):
            for tokens in group.functions:
                yield self._row(layer, group, tokens, *self._each_expert(group, golden, tokens))
        if table.shared and golden.ffn_input is not None:
            expected = (
                np.zeros_like(golden.ffn_input)
                if golden.shared_output is None
                else golden.shared_output
            )
            for tokens in table.shared.functions:
                x = golden.ffn_input[: max(tokens, MASKED_TOKENS)]
                yield self._row(
                    layer, table.shared, tokens, x, np.empty((0, len(x))), expected[: len(x)]
                )

    def dispatched(
        self,
        layer: int,
        function: str,
        rows: np.ndarray,
        ffn_input: np.ndarray,
        gates: np.ndarray,
        flipped: np.ndarray,
    ) -> Iterator[ShardResult]:
        """The dispatched sum for what a function gave for the golden's tokens `rows`, `[N,d]` and
        `[N,E]`: against the golden's delta but for tokens that were `flipped`, and against all
        experts computed and weighted, as masked routing does."""
        golden, table = self.golden.layers[layer], self.dispatch.layers[layer]
        x, by_expert = ffn_input.T, gates.T
        total = np.zeros(x.shape, np.float32)
        self.dispatch.add(
            layer,
            self.dispatch.chosen(layer, by_expert),
            x,
            by_expert,
            total,
            CallClock(PhaseFigures()),
        )
        added = golden.ffn_delta if golden.experts_delta is None else golden.experts_delta
        zeros, path = np.zeros_like(total.T), table.groups[0].path
        yield judge(
            path, "dispatch", layer, function, zeros, total.T, added[rows], self.min_cosine, flipped
        )
        if self.few:
            return
        few = slice(0, MASKED_TOKENS)
        masked = sum(
            self._run(
                group, max(group.functions), ffn_input[few], by_expert[list(group.experts)][:, few]
            )
            for group in table.all_groups
        )
        yield judge(
            path,
            "dispatch",
            layer,
            f"{function} against masked",
            zeros[few],
            total.T[few],
            np.asarray(masked),
            self.min_cosine,
        )

    def _shown(self, groups: tuple[Group, ...]) -> Iterable[Group]:
        some = sorted({0, len(groups) // 2, len(groups) - 1})
        return [groups[place] for place in some] if self.few else groups

    def _each_expert(
        self, group: Group, golden: LayerGolden, tokens: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs `[n,d]`, gates `[G,n]` and expected outputs `[n,d]`: every expert of the group
        alone on its P tokens, again and again until the last call of `tokens` is full."""
        assert (
            golden.ffn_input is not None
            and golden.expert_tokens is not None
            and golden.expert_outputs is not None
        )
        shown = golden.expert_tokens.shape[1]
        pairs = len(group.experts) * shown
        order = np.arange(-(-pairs // tokens) * tokens) % pairs
        member, probe = order // shown, order % shown
        expert = np.array(group.experts)[member]
        gates = np.zeros((len(group.experts), len(order)))
        one = golden.expert_gate
        examples = EXAMPLE_GATES if one is None else one
        gates[member, np.arange(len(order))] = np.resize(examples, len(order))
        share = gates.sum(0) / (1 if one is None else one)
        outputs = golden.expert_outputs[expert, probe] * share[:, None]
        return golden.ffn_input[golden.expert_tokens[expert, probe]], gates, outputs

    def _row(
        self,
        layer: int,
        group: Group,
        tokens: int,
        x: np.ndarray,
        gates: np.ndarray,
        expected: np.ndarray,
    ) -> ShardResult:
        y = self._run(group, tokens, x, gates)
        return judge(
            group.path,
            "experts",
            layer,
            group.functions[tokens].name,
            np.zeros_like(expected),
            y,
            expected.astype(np.float32),
            self.min_cosine,
        )

    def _run(self, group: Group, tokens: int, x: np.ndarray, gates: np.ndarray) -> np.ndarray:
        """One function on `x [n,d]` under `gates [G,n]` in calls of `tokens`, the last one padded;
        `[n,d]` in fp32."""
        with self.dispatch.cache.hold(group.key(tokens)) as function:
            pieces = [
                self._call(
                    function,
                    group,
                    tokens,
                    x[first : first + tokens],
                    gates[:, first : first + tokens],
                )
                for first in range(0, len(x), tokens)
            ]
        return np.concatenate(pieces)

    def _call(
        self, function: LoadedFunction, group: Group, tokens: int, x: np.ndarray, gates: np.ndarray
    ) -> np.ndarray:
        given = {FFN_INPUT: x.T, GATES: gates}
        features = self._scratch.features(group.functions[tokens], given)
        return by_channel(function.predict(features)["y"])[:, : len(x)].T.astype(np.float32)
