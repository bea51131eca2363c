"""What an `.aimodel` holds, as Core AI itself reads it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ane_moe.errors import UserError
from ane_moe.origins import shown
from ane_moe.package_form import PROGRAM
from ane_moe.runtime.coreai.installed import core_ai, quiet
from ane_moe.runtime.coreai.runtime import DAMAGED, check_asset

Named = tuple[tuple[str, str], ...]  # a name, and a type in Core AI's words


@dataclass(frozen=True)
class AssetFunction:
    """An entry point and what it is called with."""

    name: str
    inputs: Named
    outputs: Named
    states: Named


@dataclass(frozen=True)
class AssetSummary:
    """`elements` are of constants, by the type that they are stored in; `operations` are counted
    over all functions."""

    path: str
    program_bytes: int
    functions: tuple[AssetFunction, ...]
    elements: dict[str, int]
    operations: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def summarize_asset(path: Path) -> AssetSummary:
    """Read an asset. Raises UserError where Core AI is not installed, or it is damaged."""
    assets = core_ai("coreai.authoring.asset")
    check_asset(path)
    try:
        with quiet():
            found = assets.AIModelAsset.load(path).summary(include_statistics=True)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"Core AI cannot read {path}", str(error).split("\n")[0], DAMAGED) from None
    functions = tuple(
        AssetFunction(
            name,
            tuple(found.function_inputs(name)),
            tuple(found.function_outputs(name)),
            tuple(found.function_states(name)),
        )
        for name in found.function_names
    )
    operations = dict(sorted(found.operation_distribution, key=lambda pair: -pair[1]))
    size, elements = (path / PROGRAM).stat().st_size, dict(sorted(found.storage_types))
    return AssetSummary(shown(path), size, functions, elements, operations)
