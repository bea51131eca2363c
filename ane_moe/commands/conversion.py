"""What `convert` does: a conversion asked for, planned, carried out, and shown. Not imported before
it is needed: this takes seconds."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import typer

from ane_moe.addresses import named
from ane_moe.checkpoints.hub import local_folder
from ane_moe.commands.interruption import ended_by_interrupt
from ane_moe.conversion import stamping
from ane_moe.conversion.job import Job, job_of
from ane_moe.conversion.pipeline import ConvertReport, carry_out
from ane_moe.conversion.plan import ConvertOptions
from ane_moe.conversion.workers import open_workers
from ane_moe.demo import built_in
from ane_moe.forecast.aim import Aim
from ane_moe.forecast.objections import Objections, objections_to
from ane_moe.opened import open_model
from ane_moe.original.checkpoint_tokenizer import require_tokenizer
from ane_moe.report.convert_table import (
    ConvertBar,
    plan_document,
    print_plan,
    print_report,
    report_document,
    warnings,
)


@dataclass(frozen=True)
class Asked:
    """What the command line asks for. `options` have no sizes yet: experts of a function and layers
    of a shard are chosen by `sizes`, as `Aim.sized` takes them, when the model is open."""

    checkpoint: Path
    out: Path
    options: ConvertOptions
    sizes: tuple[str | None, str | None]
    aim: Aim
    golden: bool
    prompts: Path | None
    overwrite: bool
    workers: int
    cluster: str | None


@dataclass(frozen=True)
class Planned:
    """What was asked for, what will be done, and what speaks against that."""

    asked: Asked
    job: Job
    objections: Objections

    @property
    def warnings(self) -> list[str]:
        return warnings(self.objections, self.asked.aim.target)


def planned(asked: Asked, dry_run: bool) -> Planned:
    """Open the checkpoint, fetched as far as its weights are read, and plan. Raises UserError."""
    aim, options = asked.aim, asked.options
    aim.require_formats(options.recipe)
    fetched = () if dry_run else options.layers_read(asked.golden)
    apart = asked.cluster is not None
    source = local_folder(built_in(asked.checkpoint), fetched, apart=apart)
    source = source.absolute() if apart else source
    model = open_model(source, options.ignore_tensors, options.adapters, options.adapter_mode)
    job = job_of(model, asked.out, aim.sized(options, model.spec, asked.sizes))
    aim.require_formats(job.plan.options.recipe)  # with the forms that the checkpoint has
    return Planned(asked, job, objections_to(job.plan, aim.target))


def carried_out(way: Planned) -> ConvertReport:
    """Convert, with a bar on stderr; Ctrl-C ends the command. Raises UserError."""
    asked, kept = way.asked, f"finished shards are kept in {named(way.asked.out)}"
    with (
        ended_by_interrupt(f"ane-moe: interrupted; {kept}: run the same command again"),
        open_workers(asked.workers, stamping.__name__, asked.cluster, asked.out) as workers,
        ConvertBar(way.warnings) as bar,
    ):
        return carry_out(
            way.job,
            workers=workers,
            golden=asked.golden,
            prompts=asked.prompts,
            overwrite=asked.overwrite,
            progress=bar.update,
        )


def show_plan(way: Planned, as_json: bool) -> None:
    """Print the plan, once it is sure that nothing is in its way. Raises UserError."""
    require_tokenizer(way.job.checkpoint.folder)
    _print_all(way.warnings)
    if as_json:
        document = plan_document(way.job.plan, way.objections.concerns)
        typer.echo(json.dumps(document, indent=2))
    else:
        print_plan(way.job.plan)


def show_report(way: Planned, report: ConvertReport, as_json: bool) -> None:
    """Print what was done, and what speaks against formats that a budget chose."""
    final, target = way.objections, way.asked.aim.target
    if report.plan.options.recipe != way.job.plan.options.recipe:
        final = objections_to(report.plan, target)
        _print_all(warnings(final.beyond(way.objections), target))
    if as_json:
        typer.echo(json.dumps(report_document(report, final.concerns), indent=2))
    else:
        print_report(report, named(way.asked.checkpoint))


def _print_all(lines: Iterable[str]) -> None:
    for line in lines:
        typer.echo(line, err=True)
