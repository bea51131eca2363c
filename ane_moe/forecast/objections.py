"""What speaks against a conversion, whichever packages it is of."""

from dataclasses import dataclass

from ane_moe.conversion.plan import ConversionPlan
from ane_moe.forecast.concerns import Concern, concerns_of_plan
from ane_moe.forecast.core_ai import faults_of
from ane_moe.placement.targets import Target


@dataclass(frozen=True)
class Objections:
    """Placement rules that packages of Core ML would meet; or sentences on faults of Core AI that
    others published."""

    concerns: tuple[Concern, ...] = ()
    faults: tuple[str, ...] = ()

    def beyond(self, known: "Objections") -> "Objections":
        """Those that are not `known`."""
        return Objections(
            tuple(one for one in self.concerns if one not in known.concerns),
            tuple(one for one in self.faults if one not in known.faults),
        )


def objections_to(plan: ConversionPlan, target: Target) -> Objections:
    """What speaks against the packages of a plan; nothing is known of where Core AI runs them."""
    if plan.options.format == "mlpackage":
        return Objections(concerns_of_plan(plan, target))
    return Objections(faults=tuple(faults_of(plan.options.recipe.formats)))
