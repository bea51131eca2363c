"""A progress bar for work that says what it does, how far it is, and how much there is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def step_bar() -> Iterator[Callable[[str, int, int], None]]:
    """One bar on stderr that follows whatever is being done; gone when it ends."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    # Steps are few and long: what is left follows from all of the job so far.
    with Progress(
        *columns,
        console=Console(stderr=True),
        transient=True,
        speed_estimate_period=float("inf"),
    ) as bar:
        task = bar.add_task("reading")
        yield lambda what, done, total: bar.update(
            task, description=what, completed=done, total=total
        )
