"""A privacy filter of the published one's geometry (1.4 billion weights), the whole way: make,
convert masked and sparse, prove, and score tokens beside PyTorch.

    python scripts/full_size_filter.py --scratch /tmp/filter [--compress fp16,int8]

Every step is a command of its own; its wall time, processor time and peak memory are the operating
system's. Scoring alternates between the reference runtime and Hugging Face's own model in one
process each, on the same tokens. Weights are random. What is done is kept in the scratch folder, so
that a run that was interrupted goes on; the last step prints a table in Markdown.
"""

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from full_size import ANE_MOE, SCRIPTS, Step, table, taken, title

LIKE = "privacy-filter"
TOKENS = 512  # of the text that is scored: one full window
ROUNDS = 3
THREADS = 1


def steps(scratch: Path, formats: list[str], layers: int | None) -> Iterator[Step]:
    """Every step in order; a conversion goes when its last step is done."""
    checkpoint = str(scratch / "checkpoint")
    cut = () if layers is None else ("--layers", str(layers))
    make = (sys.executable, str(SCRIPTS / "make_checkpoint.py"), "--spectrum", "trained")
    yield Step("make the checkpoint", (*make, "--like", LIKE, *cut, "--out", checkpoint))
    for routing in ("masked", "sparse"):
        for form in formats:
            name, out = f"{routing} {form}", str(scratch / f"{routing}-{form}")
            convert = (*ANE_MOE, "convert", checkpoint, out, "--routing", routing)
            convert = (*convert, "--compress", form)
            yield Step(f"{name}: `convert`", convert, sync=True)
            yield Step(f"{name}: `convert --golden`, the golden alone", (*convert, "--golden"))
            yield Step(f"{name}: `verify`", (*ANE_MOE, "verify", out))
            score = (sys.executable, __file__, "--score", out, "--scratch", str(scratch))
            yield Step(f"{name}: {TOKENS} tokens, beside PyTorch", score)


def score(checkpoint: Path, out: Path) -> None:
    """Print tokens a second of the reference runtime and of Hugging Face's model, in turn."""
    from transformers import AutoModelForTokenClassification

    from ane_moe.loop.labels import Labeller
    from ane_moe.loop.shards import load_shards

    torch.set_num_threads(THREADS)
    labeller = Labeller(load_shards(out, "reference"))
    model = AutoModelForTokenClassification.from_pretrained(checkpoint, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, model.config.vocab_size - 1000, (1, TOKENS), generator=generator)

    @torch.inference_mode()
    def original() -> None:
        model(input_ids=ids)

    ways = {"ours": lambda: labeller.logits(ids[0].tolist()), "PyTorch bf16": original}
    for run in ways.values():
        run()
    times = {name: [_seconds(run) for _ in range(ROUNDS)] for name, run in ways.items()}
    said = (f"{name} {TOKENS / median(taken):.1f} tok/s" for name, taken in times.items())
    print(f"{', '.join(said)} ({THREADS} thread, median of {ROUNDS})")


def _seconds(run: Callable[[], object]) -> float:
    """Processor time: what runs beside does not count."""
    started = time.process_time()
    run()
    return time.process_time() - started


def main(
    scratch: Annotated[Path, typer.Option(help="Folder for everything: 10 GB.")],
    compress: Annotated[str, typer.Option(help="Weight formats to convert to.")] = "fp16,int8",
    layers: Annotated[int | None, typer.Option(help="Layers to keep; all by default.")] = None,
    score_of: Annotated[
        Path | None, typer.Option("--score", hidden=True, help="Run only this step.")
    ] = None,
) -> None:
    """Take the filter the whole way, and print what each step cost."""
    if score_of:
        return score(scratch / "checkpoint", score_of)
    rows = taken(steps(scratch, compress.split(","), layers), scratch, _without_shards)
    print(table(rows, title(LIKE, scratch / "checkpoint")))


def _without_shards(step: Step) -> None:
    """The last step of a conversion takes it away."""
    if "--score" in step.command:
        shutil.rmtree(step.command[3])


if __name__ == "__main__":
    typer.run(main)
