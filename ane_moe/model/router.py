"""The rows and ports of routers."""

from collections.abc import Iterator
from dataclasses import replace

from ane_moe.model.port import Port, Ports
from ane_moe.model.spec import AnyRouterSpec, RouterSpec
from ane_moe.model.weight import Weight

CARRY = "carry.router"
NOISE = "noise.gumbel"


def router_rows(spec: AnyRouterSpec, d_model: int, soft: bool = False) -> Iterator[Weight]:
    """The router's parameters, in its own order: where nobody is chosen, nothing biases the
    choice."""
    return (row for row in spec.rows(d_model) if not (soft and row.path == "choice_bias"))


def router_ports(spec: AnyRouterSpec, tokens: int) -> Ports:
    """The gates, the state that routers hand on, where they do, and what may disturb a choice."""
    gates = Port("gates", (1, spec.classes, 1, tokens), "gates.{0}")
    carry = Port("carry", (1, spec.carry, 1, tokens), CARRY)
    taken = (carry,) if spec.takes else ()
    if isinstance(spec, RouterSpec) and spec.noise:
        taken = (*taken, replace(gates, name="noise", slot=f"{NOISE}.{{0}}"))
    return Ports(taken, (gates, replace(carry, name="carry_out")) if spec.carry else (gates,))
