"""Reads fields of a checkpoint's config.json. A field the file lacks is an error: class defaults
are never trusted."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from ane_moe.errors import UserError

MAX_LAYERS = 256  # bounds on counts that become that many objects, before any tensor is looked at
MAX_EXPERTS = 1024
MAX_SIZE = 1 << 26
# What files call the number of experts, and of those chosen for a token.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "moe_k", "top_k_experts", "moe_topk", "num_experts_per_token")


@dataclass(frozen=True)
class Config:
    """The fields of one config.json; `where` names the file in errors.

    Fields with more than one name (older and newer files) are asked for by all of them.
    """

    values: dict[str, Any]
    where: str = "config.json"

    def renamed(self, names: Mapping[str, str], **absent: Any) -> Self:
        """With the fields that go by other `names` (theirs: ours) under ours as well, and for
        fields that are `absent` what the family's code takes them for."""
        own = {ours: self.values[theirs] for theirs, ours in names.items() if self.has(theirs)}
        return replace(self, values=absent | own | self.values)

    def has(self, name: str) -> bool:
        """Whether the file gives the field a value other than null."""
        return self.values.get(name) is not None

    def integer(self, *names: str, at_least: int = 1, at_most: int = MAX_SIZE) -> int:
        """A whole number within these bounds."""
        wanted = f"a whole number from {at_least} to {at_most}"
        return int(self._field(names, wanted, lambda v: _whole(v) and at_least <= v <= at_most))

    def number(self, *names: str) -> float:
        """A positive finite number."""
        return float(self._field(names, "a positive number", _positive))

    def flag(self, *names: str) -> bool:
        """true or false."""
        return bool(self._field(names, "true or false", lambda value: isinstance(value, bool)))

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers, empty when the field is null or absent."""
        value = self.values.get(name) or []
        if not isinstance(value, list) or not all(map(_whole, value)):
            raise self.wrong(name, "a list of whole numbers")
        return tuple(value)

    def strings(self, name: str) -> tuple[str, ...]:
        """A list of strings, empty when the field is null or absent."""
        value = self.values.get(name) or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(name, "a list of strings")
        return tuple(value)

    def token_ids(self, name: str) -> tuple[int, ...]:
        """One id, or a list of them; empty when the field is null or absent."""
        value = self.values.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(_whole(item) and item >= 0 for item in ids):
            raise self.wrong(name, "a token id or a list of them")
        return tuple(ids)

    def nullable(self, name: str) -> Any:
        """The value of a field that has to be there, but may be null."""
        if name not in self.values:
            raise self.missing(name)
        return self.values[name]

    def only(self, name: str, *allowed: Any) -> None:
        """Refuse every value of `name` but those `allowed`, which stand for the maths that is
        implemented."""
        if self.values.get(name) not in allowed:
            shown = ", ".join("null" if value is None else str(value) for value in allowed)
            raise self.wrong(name, shown)

    def missing(self, *names: str) -> UserError:
        """The error for a field the file lacks."""
        do = "the model's maths needs it and no default is assumed"
        return UserError(f"{self.where} lacks {' / '.join(names)}", do=do)

    def wrong(self, name: str, wanted: str) -> UserError:
        """The error for a value that cannot be used."""
        found = repr(self.values.get(name))[:100]
        return UserError(f"{self.where}: {name} is not supported", found, f"supported: {wanted}")

    def _field(self, names: tuple[str, ...], wanted: str, accept: Callable[[Any], bool]) -> Any:
        given = {name: self.values[name] for name in names if self.has(name)}
        if not given:
            raise self.missing(*names)
        for name, value in given.items():
            if not accept(value):
                raise self.wrong(name, wanted)
        if len(set(given.values())) > 1:
            raise UserError(
                f"{self.where} contradicts itself",
                ", ".join(f"{n} = {v}" for n, v in given.items()),
            )
        return next(iter(given.values()))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
