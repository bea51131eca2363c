"""What a package holds, without loading a weight or executing anything."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ane_moe.mlprogram.pipeline import OpenPipeline
from ane_moe.mlprogram.program import Feature, Function, Interface, Program
from ane_moe.mlprogram.reader import read_program
from ane_moe.mlprogram.weights import Weight, operations_of, unique_bytes, weights_of
from ane_moe.origins import shown

# The first system that reads a specification version.
SYSTEMS = {6: "iOS 15", 7: "iOS 16", 8: "iOS 17", 9: "iOS 18", 10: "iOS 26"}


@dataclass(frozen=True)
class FunctionSummary:
    """`operations` counts by type, most frequent first, nested blocks included."""

    name: str
    opset: str
    interface: Interface
    operations: dict[str, int]
    weights: tuple[Weight, ...]
    weight_bytes: int


@dataclass(frozen=True)
class FormatTotal:
    """All weights of one storage format in a package; weights that functions share are counted
    once."""

    format: str
    weights: int
    elements: int
    stored_bytes: int


@dataclass(frozen=True)
class Summary:
    """`weight_bytes` counts each stored constant once; `system` is the oldest that runs it.

    `absent` says what is wrong with weight files that are not there; sizes are those declared.
    """

    path: Path
    specification_version: int
    system: str
    default_function: str
    functions: tuple[FunctionSummary, ...]
    formats: tuple[FormatTotal, ...]
    weight_bytes: int
    metadata: dict[str, str]
    absent: tuple[str, ...]


@dataclass(frozen=True)
class StageSummary:
    """`program` and its summary are None for a stage that is not an ML Program."""

    index: int
    kind: str
    program: Program | None
    summary: Summary | None


@dataclass(frozen=True)
class PipelineSummary:
    """A pipeline as it describes itself, and its stages in order."""

    path: Path
    specification_version: int
    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]
    stages: tuple[StageSummary, ...]
    metadata: dict[str, str]


def summarize_pipeline(pipeline: OpenPipeline) -> PipelineSummary:
    """Summarize each stage. Raises UserError for one that is not sound."""
    stages = []
    for stage in pipeline.stages:
        program = stage.program.read() if stage.program else None
        summary = summarize(program) if program else None
        stages.append(StageSummary(stage.index, stage.kind, program, summary))
    return PipelineSummary(
        pipeline.path,
        pipeline.specification_version,
        pipeline.inputs,
        pipeline.outputs,
        tuple(stages),
        pipeline.metadata,
    )


def pipeline_document(summary: PipelineSummary) -> dict:
    """The summary as plain values for JSON; a stage that is no ML Program has its kind alone."""
    stages = [
        {"index": stage.index, "kind": stage.kind}
        | ({"program": summary_document(stage.summary)} if stage.summary else {})
        for stage in summary.stages
    ]
    document = asdict(replace(summary, stages=()))
    return document | {"path": shown(summary.path), "stages": stages}


def summarize(package: Path | Program) -> Summary:
    """Summarize a package on disk, its weights there or not, or one read before.

    Raises UserError for what is not a sound ML Program.
    """
    program = package
    if not isinstance(program, Program):
        program = read_program(program, require_weights=False)
    functions = tuple(
        _function(function, program.interfaces[name])
        for name, function in program.functions.items()
    )
    weights = [weight for function in functions for weight in function.weights]
    return Summary(
        path=program.path,
        specification_version=program.specification_version,
        system=SYSTEMS[program.specification_version],
        default_function=program.default_function,
        functions=functions,
        formats=_totals(weights),
        weight_bytes=unique_bytes(weights),
        metadata=program.metadata,
        absent=program.absent,
    )


def summary_document(summary: Summary) -> dict:
    """The summary as plain values for JSON; sizes are bytes, unknown dimensions null."""
    document = asdict(summary)
    document["path"] = shown(summary.path)
    for function in document["functions"]:
        function |= function.pop("interface")
        for weight in function["weights"]:
            del weight["parts"]
    return document


def _function(function: Function, interface: Interface) -> FunctionSummary:
    weights = weights_of(function)
    counts = Counter(op.type for op in operations_of(function.block))
    ordered = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
    return FunctionSummary(
        function.name, function.opset, interface, ordered, weights, unique_bytes(weights)
    )


def _totals(weights: Iterable[Weight]) -> tuple[FormatTotal, ...]:
    by_format: dict[str, dict[object, Weight]] = {}
    for weight in weights:
        by_format.setdefault(weight.format, {})[weight.parts] = weight
    totals = [
        FormatTotal(
            name, len(group), sum(w.elements for w in group.values()), unique_bytes(group.values())
        )
        for name, group in by_format.items()
    ]
    return tuple(sorted(totals, key=lambda total: (-total.stored_bytes, total.format)))
