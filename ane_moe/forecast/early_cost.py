"""What it takes that attention shards guess experts (`convert --early`), of their bytes alone. A
prediction: nothing here runs anything. d = d_model, E = experts.
"""

from dataclasses import asdict, dataclass
from typing import Any

from ane_moe.conversion.early import rankings
from ane_moe.forecast.chips import SCENARIOS, Chip, Range
from ane_moe.model.spec import ModelSpec, MoeSpec
from ane_moe.wording import counted

LEAST_MS = 0.001  # that is worth a figure


@dataclass(frozen=True)
class EarlyCost:
    """So many `layers` score the experts of the next one that has any: `weight_bytes` of all their
    matrices `[E,d]` and biases `[E]`, and the ms a token that reading these takes."""

    layers: int
    weight_bytes: int
    token_ms: Range

    @property
    def sentence(self) -> str:
        ends = asdict(self.token_ms).values()
        ms = "-".join(f"{end:.2g}" for end in ends) if max(ends) >= LEAST_MS else f"< {LEAST_MS}"
        mb, layers = self.weight_bytes / self.layers / 1e6, counted(self.layers, "layer")
        return (
            f"Guesses of attention shards a layer ahead (convert --early) take {mb:.2g} MB a layer "
            f"({layers}) and {ms} ms a token, predicted by their bytes."
        )

    def as_json(self) -> dict[str, Any]:
        return {"kind": "predicted", **asdict(self)}


def early_cost(spec: ModelSpec, chip: Chip) -> EarlyCost | None:
    """None where shards guess nothing."""
    routed = [n for n, layer in enumerate(spec.layers) if isinstance(layer.ffn, MoeSpec)]
    if spec.tracks or not (guessed := rankings(spec, routed[1:])):
        return None
    size = sum(_bytes(spec, layer, how.bias) for layer, how in guessed.items())
    rate = chip.range("stream_gb_s")
    fast, expected, slow = (size / rate.of_rate(end) / 1e6 for end in SCENARIOS)
    return EarlyCost(len(guessed), size, Range(fast, expected, slow))


def _bytes(spec: ModelSpec, layer: int, bias: bool) -> int:
    ffn = spec.layers[layer].ffn
    assert isinstance(ffn, MoeSpec)
    return 2 * ffn.router.classes * (spec.d_model + bias)
