"""Which is better for a chip: the packages of tracks called side by side, or one graph for all of a
block. Two programs use both engines of a chip that has two; one saves calls everywhere."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from ane_moe.conversion.plan import ConvertOptions
from ane_moe.errors import UserError
from ane_moe.forecast.chips import Chip, Range
from ane_moe.forecast.cost_model import predict
from ane_moe.forecast.layer_kinds import plan_kinds
from ane_moe.forecast.workload import workload_of_plan
from ane_moe.model.spec import ModelSpec

# The tracks that are called at once in each form: more than two engines no chip has.
AT_ONCE: dict[Literal["apart", "packed"], int] = {"apart": 2, "packed": 1}


@dataclass(frozen=True)
class TrackForm:
    """One form of the tracks, predicted; where it is not possible, `refusal` says why."""

    tracks: str
    concurrency: int
    calls_per_token: float = 0.0
    tok_s: Range | None = None
    refusal: str = ""


def track_forms(spec: ModelSpec, options: ConvertOptions, chip: Chip) -> tuple[TrackForm, ...]:
    """Both forms, the one expected to be faster first; nothing for a model without tracks."""
    if not spec.tracks:
        return ()
    found = []
    for tracks, at_once in AT_ONCE.items():
        try:
            kinds = plan_kinds(spec, replace(options, tracks=tracks))
        except UserError as error:
            found.append(TrackForm(tracks, at_once, refusal=str(error)))
            continue
        workload = workload_of_plan(kinds.plan, kinds.repeats)
        speed = predict(workload, chip, concurrency=at_once).decode.tok_s
        found.append(TrackForm(tracks, at_once, workload.calls_per_token.expected, speed))
    return tuple(sorted(found, key=lambda form: -form.tok_s.expected if form.tok_s else 0.0))


def advice(forms: Sequence[TrackForm], chip: str) -> str:
    """What to take, as a sentence."""
    best, *others = forms
    assert best.tok_s is not None
    beside = f" --concurrency {best.concurrency}" if best.concurrency > 1 else ""
    against = ", ".join(
        f"{other.tracks} {other.tok_s.expected:.1f}"
        if other.tok_s
        else f"{other.tracks} is not possible ({other.refusal})"
        for other in others
    )
    return (
        f"Take --tracks {best.tracks}{beside} on {chip}: predicted {best.tok_s.expected:.1f} tok/s "
        f"({best.tok_s.low:.1f} to {best.tok_s.high:.1f}) by {best.calls_per_token:.0f} calls a "
        f"token, int8; {against}."
    )


def as_json(forms: Sequence[TrackForm]) -> list[dict[str, Any]]:
    return [{"kind": "predicted", **asdict(form)} for form in forms]
