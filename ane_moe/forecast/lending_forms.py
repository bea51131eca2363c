"""Which is better for a chip: layers that read another one's caches as packages of their own, which
the host hands these, or all of them in one package with the layer that keeps them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ane_moe.conversion.plan import MB, ConvertOptions, ShardPlan, sources_of
from ane_moe.conversion.planner import make_plan
from ane_moe.forecast.chips import Chip, Range
from ane_moe.forecast.cost_model import breakdown
from ane_moe.forecast.pieces import pieces_of
from ane_moe.forecast.workload import Calls, assemble
from ane_moe.model.spec import ModelSpec


@dataclass(frozen=True)
class LendingForm:
    """These layers in one form, predicted: ms of a decoded token, of a token of a long prompt, and
    of what its last token goes through afterwards; `largest_bytes` of weights in a package."""

    layers_per_shard: int
    packages: int
    largest_bytes: int
    decode_ms: Range
    prefill_ms: Range
    tail_ms: Range


@dataclass(frozen=True)
class LendingForms:
    """`layers`, the first of which lends, by ports and in one package. One package is taken where a
    token costs less in it, and it is not above `limit_bytes`."""

    chip: str
    layers: tuple[int, ...]
    ports: LendingForm
    together: LendingForm
    limit_bytes: int

    @property
    def best(self) -> LendingForm:
        fits = self.together.largest_bytes <= self.limit_bytes
        faster = self.together.decode_ms.expected < self.ports.decode_ms.expected
        return self.together if fits and faster else self.ports

    @property
    def sentence(self) -> str:
        """What to take, and why."""
        ports, one = self.ports, self.together
        taken = "one package" if self.best is one else "ports"
        option = f"--layers-per-shard {self.best.layers_per_shard}"
        size, limit = one.largest_bytes / MB, self.limit_bytes / MB
        room = (
            f"it takes {size:.0f} MB, and --max-shard-mb is {limit:.0f}"
            if size > limit
            else f"it fits: {size:.0f} of {limit:.0f} MB"
        )
        return (
            f"Layers {self.layers[0]}-{self.layers[-1]} share caches: take {taken} ({option}) on "
            f"{self.chip}. Predicted {one.decode_ms.expected:.2f} ms a token in one package, "
            f"{ports.decode_ms.expected:.2f} by ports in {ports.packages}, int8; a prompt's last "
            f"token {one.tail_ms.expected:.2f} and {ports.tail_ms.expected:.2f} ms; {room}."
        )

    def as_json(self) -> dict[str, Any]:
        """Plain JSON data, labelled as a prediction."""
        return {"kind": "predicted", "best": self.best.layers_per_shard, **asdict(self)}


def lending_forms(spec: ModelSpec, options: ConvertOptions, chip: Chip) -> LendingForms | None:
    """Both forms of the last layers that read another one's caches; None for a model without."""
    if not spec.lenders:
        return None
    lender = max(spec.lenders)
    layers = tuple(n for n in range(len(spec.layers)) if spec.source(n) == lender)
    own = replace(options, layers=layers)
    # Whatever it takes: whether that is too much is for `best` to say.
    unlimited = replace(own, layers_per_shard=len(layers), max_shard_mb=1 << 11)
    sources = sources_of(spec)
    ports, together = (make_plan(spec, sources, form).shards for form in (own, unlimited))
    if len(together) > 1:  # other things than their number keep them apart
        return None
    return LendingForms(
        chip.name,
        layers,
        _form(ports, own, chip),
        _form(together, unlimited, chip),
        options.max_shard_mb * MB,
    )


def _form(shards: Sequence[ShardPlan], options: ConvertOptions, chip: Chip) -> LendingForm:
    pieces, recipe = pieces_of(shards, {}), options.recipe.name
    work = assemble(pieces, options.routing, recipe, options.prefill, 0)

    def ms(calls: tuple[Calls, ...], steps: int = 1) -> Range:
        return (
            breakdown(calls, chip, steps=steps, host=False).per_token_ms
            if calls
            else Range(0, 0, 0)
        )

    return LendingForm(
        options.layers_per_shard,
        len(shards),
        max(shard.weight_bytes for shard in shards),
        ms(work.decode),
        ms(work.prefill, work.prefill_tokens),
        ms(work.tail),
    )
