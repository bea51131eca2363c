"""The whole way at a real model's size: make, plan, convert, prove, generate, time, report.

    python scripts/full_size.py --like olmoe-1b-7b --scratch /tmp/full [--layers 4]
                                [--llama-cpp PYTHON]

Every step is a command of its own, as a user would type it; its wall time, processor time and peak
memory are the operating system's. Beside them stand the alternatives: `cp` of the checkpoint, and
Hugging Face's `generate` on the same weights; with a Python that has llama-cpp-python and gguf, and
OLMoE's geometry, llama.cpp too. Weights are random, with a trained matrix's spectrum
and an uneven router. What is done is kept in the scratch folder, so that a run that was interrupted
goes on; the last step prints a table in Markdown.
"""

import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import psutil
import torch
import typer
from command_cost import cost_of

from ane_moe.files import write_text

SCRIPTS = Path(__file__).parent
ANE_MOE = (sys.executable, "-m", "ane_moe")
PROMPT = ",".join(str(id) for id in range(1000, 1032))
HF_DTYPES = {"bfloat16": 2, "float32": 4}  # bytes of a weight
# Room that a model needs beside its weights before this machine begins to swap.
SPARE = 1.15
SHOWN = 100  # characters of what a step said


@dataclass(frozen=True)
class Step:
    """One command. `sync`: its time ends when the data is on the disk; `figures`: where it says
    what matters."""

    name: str
    command: tuple[str, ...]
    sync: bool = False
    figures: Literal["stdout", "stderr"] = "stdout"


@dataclass(frozen=True)
class Row:
    """What a step cost, and the last line it printed."""

    name: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    said: str


def steps(
    like: str,
    layers: int | None,
    scratch: Path,
    compress: str,
    tokens: int,
    llama_cpp: Path | None,
) -> Iterator[Step]:
    """Every step in order."""
    checkpoint, copy = scratch / "checkpoint", scratch / "copy"
    cut = () if layers is None else ("--layers", str(layers))
    make = (sys.executable, str(SCRIPTS / "make_checkpoint.py"), "--spectrum", "trained")
    yield Step("make the checkpoint", (*make, "--like", like, *cut, "--out", str(checkpoint)))
    yield Step("beside: `cp` and `sync`", ("cp", "-r", str(checkpoint), str(copy)), sync=True)
    yield Step("`plan`", (*ANE_MOE, "plan", str(checkpoint)))
    yield Step(
        "`convert --dry-run`",
        (*ANE_MOE, "convert", str(checkpoint), str(scratch / "none"), "--dry-run"),
    )
    for routing in ("masked", "sparse"):
        out = str(scratch / routing)
        convert = (*ANE_MOE, "convert", str(checkpoint), out, "--routing", routing)
        convert = (*convert, "--compress", compress)
        yield Step(f"{routing}: `convert --compress {compress}`", convert, sync=True)
        yield Step(f"{routing}: `convert --golden`, the golden alone", (*convert, "--golden"))
        yield Step(f"{routing}: `verify`", (*ANE_MOE, "verify", out))
        generate = (*ANE_MOE, "generate", out, "--prompt-ids", PROMPT, "--max-tokens", str(tokens))
        yield Step(f"{routing}: `generate`, {tokens} tokens", generate, figures="stderr")
        bench = ("bench", out, "--runs", "3", "--warmup", "1", "--tokens", "4")
        yield Step(f"{routing}: `bench`", (*ANE_MOE, *bench, "--fills", "0", "--lengths", "64"))
        yield Step(f"{routing}: `report`", (*ANE_MOE, "report", out, "--no-verify"))
    for dtype in HF_DTYPES:
        child = (sys.executable, __file__, "--hugging-face", dtype, "--tokens", str(tokens))
        name = f"beside: Hugging Face `generate`, {dtype}, {tokens} tokens"
        yield Step(name, (*child, "--like", like, "--scratch", str(scratch)))
    if llama_cpp is not None:
        child = ("env", f"PYTHONPATH={SCRIPTS.parent}", str(llama_cpp))
        script = (*child, str(SCRIPTS / "llama_cpp_speed.py"), str(checkpoint))
        script = (*script, "--gguf", str(scratch / "q8_0.gguf"))
        yield Step("beside: llama.cpp's Q8_0, written", (*script, "--tokens", "1"))
        name = f"beside: llama.cpp's Q8_0, {tokens} tokens"
        yield Step(name, (*script, "--tokens", str(tokens)))


def measured(step: Step) -> Row:
    """Run a step; ends the script where it fails for another reason than a gate."""
    cost = cost_of(step.command, step.sync)
    if cost.code not in (0, 1):
        sys.exit(f"{step.name}: exit code {cost.code}\n{cost.stderr[-2000:]}")
    lines = [line.strip() for line in getattr(cost, step.figures).splitlines() if line.strip()]
    said = f"exit code {cost.code}; " * bool(cost.code) + (lines[-1] if lines else "")
    return Row(step.name, cost.seconds, cost.cpu_seconds, cost.peak_bytes, said)


def table(rows: list[Row], title: str) -> str:
    """The rows as Markdown."""
    lines = [
        title,
        "",
        "| step | wall | CPU | peak memory | its last line |",
        "|---|---:|---:|---:|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.name} | {row.seconds:,.1f} s | {row.cpu_seconds:,.1f} s "
            f"| {row.peak_bytes / 1e6:,.0f} MB | {row.said.replace(chr(124), chr(47))[:SHOWN]} |"
        )
    return "\n".join(lines)


def taken(steps: Iterable[Step], scratch: Path, clean: Callable[[Step], None]) -> list[Row]:
    """Take the steps that an earlier run left, clean up after each, and keep what each cost."""
    scratch.mkdir(parents=True, exist_ok=True)
    kept = scratch / "steps.json"
    rows = [Row(**row) for row in json.loads(kept.read_text())] if kept.is_file() else []
    done = {row.name for row in rows}
    for step in steps:
        if step.name in done:
            continue
        rows.append(measured(step))
        print(f"{rows[-1].name}: {rows[-1].seconds:.1f} s: {rows[-1].said}", file=sys.stderr)
        write_text(kept, json.dumps([asdict(row) for row in rows], indent=1))
        clean(step)
    return rows


def title(what: str, checkpoint: Path) -> str:
    """What was measured, and on what."""
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    return (
        f"{what}, {size / 1e9:.1f} GB of bf16; {platform.system()}, {os.cpu_count()} cores, "
        f"{psutil.virtual_memory().total / 1e9:.0f} GB, load {os.getloadavg()[1]:.1f} at the end."
    )


def hugging_face(checkpoint: Path, dtype: str, tokens: int) -> None:
    """Greedy text from Hugging Face's own model: prints its speed, without loading."""
    import time

    from transformers import AutoModelForCausalLM

    stored = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    needed = stored / HF_DTYPES["bfloat16"] * HF_DTYPES[dtype] * SPARE
    if needed > psutil.virtual_memory().available:
        print(f"not run: {dtype} weights need {needed / 1e9:.0f} GB of memory")
        return
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
    ids = torch.tensor([[int(id) for id in PROMPT.split(",")]])
    times = []
    for count in (1, tokens + 1):  # the prompt and one token, then `tokens` more
        started = time.monotonic()
        model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        times.append(time.monotonic() - started)
    print(f"{tokens / (times[1] - times[0]):.2f} tok/s decoding, prompt and one {times[0]:.2f} s")


def main(
    like: Annotated[str, typer.Option(help="A model that make_checkpoint.py knows.")],
    scratch: Annotated[Path, typer.Option(help="Folder for everything: three times the model.")],
    layers: Annotated[int | None, typer.Option(help="Layers to keep; all by default.")] = None,
    compress: Annotated[str, typer.Option(help="Weight format of the conversions.")] = "int8",
    tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 16,
    llama_cpp: Annotated[
        Path | None, typer.Option(help="A Python that has llama-cpp-python and gguf.")
    ] = None,
    hugging_face_dtype: Annotated[
        str | None, typer.Option("--hugging-face", hidden=True, help="Run only this step.")
    ] = None,
) -> None:
    """Take a model of real size the whole way, and print what each step cost."""
    if hugging_face_dtype:
        return hugging_face(scratch / "checkpoint", hugging_face_dtype, tokens)
    rows = taken(
        steps(like, layers, scratch, compress, tokens, llama_cpp),
        scratch,
        lambda _: shutil.rmtree(scratch / "copy", ignore_errors=True),
    )
    cut = "all layers" if layers is None else f"{layers} layers"
    print(table(rows, title(f"{like}, {cut}", scratch / "checkpoint")))


if __name__ == "__main__":
    typer.run(main)
