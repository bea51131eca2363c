"""What a router chooses experts by, as far as one matrix and a vector say it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ane_moe.errors import UserError

SCORES = ("logits", "sigmoid", "softmax")


@dataclass(frozen=True)
class Ranking:
    """Logits, kept within `softcap` by a tanh; their `score`, and a `bias` by expert added to it.
    The highest are chosen, with `groups` of neighbours out of the `open_groups` whose `group_best`
    highest sum up highest. They are of a stream less its mean over channels where it is `centred`,
    as layer norms have it, and `before_mixer` as it enters the layer."""

    score: Literal["logits", "sigmoid", "softmax"] = "logits"
    bias: bool = False
    softcap: float | None = None
    groups: int = 1
    open_groups: int = 1
    group_best: int = 1
    centred: bool = False
    before_mixer: bool = False

    @property
    def sees_scale(self) -> bool:
        """Whether another order can come of logits that are all multiplied by one number."""
        return self.bias or self.score != "logits"

    def as_json(self) -> dict[str, Any]:
        """What differs from the highest logits; `parse_ranking` reads it."""
        plain = asdict(PLAIN)
        return {name: one for name, one in asdict(self).items() if one != plain[name]}


PLAIN = Ranking()


def parse_ranking(facts: Mapping[str, Any], classes: int) -> Ranking:
    """What `as_json` wrote, of so many `classes`. Raises UserError when it is nothing of that."""
    try:
        ranking = Ranking(**facts)
        flags = (ranking.bias, ranking.centred, ranking.before_mixer)
        counts = (ranking.groups, ranking.open_groups, ranking.group_best)
        sound = (
            ranking.score in SCORES
            and all(isinstance(one, bool) for one in flags)
            and all(isinstance(count, int) for count in counts)
            and (ranking.softcap is None or ranking.softcap > 0)
            and 1 <= ranking.open_groups <= ranking.groups
            and classes % ranking.groups == 0
            and 1 <= ranking.group_best <= classes // ranking.groups
        )
    except (TypeError, ValueError):
        sound = False
    if not sound:
        raise UserError("how a router ranks experts is not known", str(facts), "convert again")
    return ranking
