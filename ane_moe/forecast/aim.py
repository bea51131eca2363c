"""What a conversion is made for: a chip under a system, what that chooses, and what it refuses."""

from dataclasses import dataclass, replace

from ane_moe.conversion.plan import ConvertOptions
from ane_moe.errors import UserError
from ane_moe.forecast.concerns import require_engine_formats
from ane_moe.forecast.design import AUTO, sizes_of
from ane_moe.formats.recipe import Recipe
from ane_moe.model.spec import ModelSpec
from ane_moe.placement.targets import DEFAULT_OS, DEFAULT_TARGET, Target, find_target

ONE = "1"


@dataclass(frozen=True)
class Aim:
    """The chip and the system whose placement rules a conversion is held against. Where the chip
    was `named`, sizes are chosen for it that nobody gave, and weight formats that take the model
    off its engine are refused, unless they are to be allowed (`allow_cpu`)."""

    target: Target
    named: bool = False
    allow_cpu: bool = False

    def require_formats(self, recipe: Recipe) -> None:
        """Raise UserError as `require_engine_formats`, where that was asked for."""
        if self.named and not self.allow_cpu:
            require_engine_formats(recipe, self.target)

    def sized(
        self, options: ConvertOptions, spec: ModelSpec, sizes: tuple[str | None, str | None]
    ) -> ConvertOptions:
        """The options with experts of a function and layers of a shard: `sizes` as `sizes_of` takes
        them, None for one, or for AUTO where the chip was named and it says something of the
        routing. Raises UserError as that does."""
        unsaid = AUTO if self.named else ONE
        experts, layers = sizes
        asked = (
            experts or (unsaid if options.routing == "sparse" else ONE),
            layers or (ONE if options.dispatches else unsaid),
        )
        experts_per_function, layers_per_shard = sizes_of(spec, options, asked, self.target)
        return replace(
            options, experts_per_function=experts_per_function, layers_per_shard=layers_per_shard
        )


def aim_of(target: str | None, system: int | None, allow_cpu: bool, form: str = "mlpackage") -> Aim:
    """The aim by the options of `convert`, None where one was not given; `form` is that of the
    packages. Raises UserError for a chip or a system that no rule speaks of, and for any of them
    where packages are Core AI's."""
    ruled = {"--target": target, "--os": system, "--allow-cpu": allow_cpu}
    given = [name for name, value in ruled.items() if value]
    if form == "aimodel" and given:
        raise UserError(
            f"{given[0]} is of Core ML's placement rules",
            "--format aimodel",
            f"leave {given[0]} out: nothing is known of where Core AI runs a graph",
        )
    place = find_target(target or DEFAULT_TARGET, system or DEFAULT_OS)
    return Aim(place, target is not None, allow_cpu)
