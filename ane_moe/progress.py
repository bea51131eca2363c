"""How a long job says where it is."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # what is being done, steps done, steps in all

WHOLE = 10_000  # steps of a job whose phases are of different weight


def silent(_what: str, _done: int, _total: int) -> None:
    """The progress of nobody watching."""


def phase(progress: Progress, first: float, last: float) -> Progress:
    """The progress of a phase that goes from `first` to `last` of a job, shares of 1."""

    def report(what: str, done: int, total: int) -> None:
        share = done / total if total else 0.0
        progress(what, round(WHOLE * (first + (last - first) * share)), WHOLE)

    return report
