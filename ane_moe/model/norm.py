"""A norm over channels, as data."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from ane_moe.model.weight import Weight


@dataclass(frozen=True)
class NormSpec:
    """A normalisation over channels: by the root of the mean square, or as torch's LayerNorm. Of
    norms in front of mixers and experts, what they give is multiplied by the sigmoid of an MLP of
    it, `gate_rank` channels wide inside (`AXK2GatedRMSNorm`)."""

    eps: float = 1e-6
    kind: Literal["rms", "layer"] = "rms"
    bias: bool = False
    gate_rank: int | None = None

    @property
    def ungated(self) -> "NormSpec":
        """The norm of dense layers, and of the head."""
        return replace(self, gate_rank=None)

    def rows(self, d_model: int, fold: str = "", path: str = "norm") -> Iterator[Weight]:
        """The tensors of a norm of so many channels, multiplied by what `fold` names."""
        yield Weight(f"{path}.weight", (d_model,), fold=fold)
        if self.bias:
            yield Weight(f"{path}.bias", (d_model,), fold=fold)
        if self.gate_rank:
            yield Weight(f"{path}.gate_down.weight", (self.gate_rank, d_model))
            yield Weight(f"{path}.gate_up.weight", (d_model, self.gate_rank))
