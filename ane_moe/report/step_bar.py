"""A progress bar for work that says what it does, how far it is, and how much there is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def step_bar() -> Iterator[Callable[[str, int, int], None]]:
    """One bar on stderr that follows whatever is being done; gone when it ends."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading")
        yield lambda what, done, total: bar.update(
            task, description=what, completed=done, total=total
        )
