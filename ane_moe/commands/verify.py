"""`ane-moe verify`: prove a conversion right."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer


def verify(
    out: Annotated[Path, typer.Argument(help="Folder of a conversion.", show_default=False)],
    checkpoint: Annotated[Path | None, typer.Option(
        help="Capture the golden from this checkpoint now, instead of reading the one in OUT.")] = None,
    prompts: Annotated[Path | None, typer.Option(
        help="Prompts for --checkpoint: text parted by lines of ---, or a .json list of texts or token ids.")] = None,
    runtime: Annotated[str, typer.Option(help="reference, coreml or auto.")] = "auto",
    min_cosine: Annotated[float | None, typer.Option(
        min=0, max=1, help="Cosine every function must reach.",
        show_default="0.999 for fp16 weights, 0.97 compressed")] = None,
    min_logit_cosine: Annotated[float | None, typer.Option(
        help="Mean cosine the whole model's logits must reach.",
        show_default="0.99 for fp16 weights, 0.9 compressed")] = None,
    decode_tokens: Annotated[int, typer.Option(
        min=0, help="Tokens for one-token calls where prefill covers all of them; 0 for no limit.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Check the shards in OUT against the original model.

    Files first (sha256, missing and extra shards, NaN in weights), then every function of every shard on the golden's
    inputs, then routing, then the whole model. Exits with 1 when a gate fails.
    """
    from rich.console import Console

    from ane_moe.report.verify_table import verify_report
    from ane_moe.verify.verify import verify as run

    with _progress() as progress:
        report = run(out, checkpoint=checkpoint, prompts=prompts, runtime=runtime, min_cosine=min_cosine,
                     min_logit_cosine=min_logit_cosine, decode_tokens=decode_tokens or None, progress=progress)
    if as_json:
        typer.echo(json.dumps(report.as_json(), indent=2))
    else:
        Console().print(verify_report(report), soft_wrap=True)  # a path stays on one line
    if not report.passed:
        raise typer.Exit(1)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """One bar on stderr that follows whatever is being done; gone when it ends."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading")
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
