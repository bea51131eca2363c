"""What an operation met while the engine's arithmetic was computed: how near its sums came to the
limit, what overflowed, and which products were dropped."""

from dataclasses import dataclass, field
from typing import NamedTuple


class Site(NamedTuple):
    """Where an operation stands: the package's path, the function, its type and its name."""

    package: str
    function: str
    op: str
    name: str


NOWHERE = Site("", "", "", "")


@dataclass
class Met:
    """Of all calls of one operation.

    terms: the longest sum (0: not a sum of products). limit: the magnitude at which it overflows.
    largest_result: the largest finite output. largest_partial: what a partial sum of the terms that
    were met can reach if they come in the worst order. largest_possible: the same for any input as
    large as the largest that was met, `largest_input`. overflows: results that are Inf, of
    `results`. on_the_way: of these, those whose whole sum is below the limit. at_risk: results that
    would be Inf in some order. dropped, products: products other than zero.
    """

    limit: float
    terms: int = 0
    largest_result: float = 0.0
    largest_partial: float = 0.0
    largest_possible: float = 0.0
    overflows: int = 0
    on_the_way: int = 0
    at_risk: int = 0
    largest_input: float = 0.0
    results: int = 0
    dropped: int = 0
    products: int = 0

    @property
    def dropped_share(self) -> float:
        return self.dropped / self.products if self.products else 0.0


@dataclass
class Ledger:
    """What was met, by site, in the order of the first calls."""

    sites: dict[Site, Met] = field(default_factory=dict)

    def at(self, site: Site, limit: float) -> Met:
        return self.sites.setdefault(site, Met(limit))
