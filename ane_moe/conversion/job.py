"""Job: one conversion, opened once and passed on."""

from dataclasses import dataclass, replace
from pathlib import Path

from ane_moe.conversion.as_stored import notes, with_stored_forms
from ane_moe.conversion.plan import ConversionPlan, ConvertOptions, SourceFacts
from ane_moe.conversion.planner import make_plan
from ane_moe.early_adapters import Adapters, read_adapters
from ane_moe.errors import UserError
from ane_moe.families import beside
from ane_moe.formats.mixture import with_mixed_formats
from ane_moe.opened import Model, open_model
from ane_moe.remote_folder import RemoteFolder, SentFile


@dataclass(frozen=True, kw_only=True)
class Job(Model):
    """A model on its way into the folder `out`, by a plan. `calibration` is a file, where there is
    one. Where it all goes to an address in the end, `away`, `out` is a scratch folder, and workers
    find the calibration where it was `sent`."""

    plan: ConversionPlan
    out: Path
    calibration: Path | None = None
    away: RemoteFolder | None = None
    sent: SentFile | None = None


def plan_of(model: Model, options: ConvertOptions) -> ConversionPlan:
    """What `convert` would write, and how the checkpoint was read. Raises UserError."""
    checkpoint = model.checkpoint
    recipe = with_stored_forms(options.recipe, checkpoint, model.sources)
    settled = replace(options, recipe=with_mixed_formats(recipe, model.sources))
    early = _early_adapters(model, options)
    plan = make_plan(model.spec, model.sources, settled, model.low_ranks, early)
    used = {name: model.sources[name] for name, _ in plan.spec.weights()}
    left_out = checkpoint.left_out(used, options.ignore_tensors, beside(model.spec.family))
    said = (*checkpoint.notes, *notes(options.recipe, checkpoint, model.sources))
    return replace(plan, source=SourceFacts(said, left_out))


def require_early(early: str | Path | None, ahead: int | None) -> None:
    """Raise UserError where it is said how far ahead experts are guessed, and not by what."""
    if ahead is not None and early is None:
        raise UserError(
            "--ahead says how far shards guess experts",
            "no --early",
            "give --early FILE, or leave it out",
        )


def _early_adapters(model: Model, options: ConvertOptions) -> Adapters | None:
    """Raises UserError where the host loads no experts, for a file of another model, and as
    `require_early`."""
    if options.early is None:
        require_early(None, None if options.ahead == 1 else options.ahead)
        return None
    if not options.dispatches:
        raise UserError(
            "--early is of experts that are loaded ahead",
            f"{options.routing} routing loads all of them",
            "give --routing sparse or stream, or leave --early out",
        )
    return read_adapters(Path(options.early), model.spec.d_model)


def job_of(model: Model, out: Path, options: ConvertOptions) -> Job:
    """Plan the conversion of a model that is open. Raises UserError."""
    return Job(**vars(model), plan=plan_of(model, options), out=out)


def open_job(path: Path, out: Path, options: ConvertOptions) -> Job:
    """Open a checkpoint folder and plan its conversion. Raises UserError."""
    model = open_model(path, options.ignore_tensors, options.adapters, options.adapter_mode)
    return job_of(model, out, options)
