"""Attention among the tokens of one call, both ways."""

from torch import Tensor

from ane_moe.parts.attention import Attention


class BandAttention(Attention):
    """`y = x + attention(norm(x))` over the call's own keys and values, as the mask allows."""

    def mix(self, h: Tensor, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        q, k, v = self._heads(h, inputs.get("cos"), inputs.get("sin"))
        return self.o(self._attend(q, k, v, inputs["mask"])), {}
