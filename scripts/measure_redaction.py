"""Redact logs of rising sizes: the rate, and the memory that does not rise with them.

    python scripts/measure_redaction.py [--shards demo] [--megabytes 5,10,20]

The lines are generated (private_sentences.py needs Faker, this does not): requests, logins,
payments, and noise. Times and memory are the operating system's, of the command as a user types it.
"""

import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from command_cost import Cost, cost_of

MB = 1_000_000
NAMES = ("Jane Doe", "Tom Berger", "Aïcha Benali", "Li Wei", "Marta Kowalska", "Olu Adeyemi")
WORDS = ("harbour", "meadow", "copper", "lantern", "falcon", "willow", "ember", "quartz")
LINES = (
    "{time} INFO cache hit for key {hash} in {number} ms",
    "{time} INFO GET /{word}/{number} 200 {number} bytes",
    "{time} DEBUG worker {number} finished job {hash}",
    "{time} WARN retry {number} of {word}_{word} after timeout",
    "{time} INFO login by {mail} from 10.0.{number}.7",
    "{time} INFO order {hash} shipped to {name}",
    "{time} ERROR payment of {name} failed, card 4{number}1 {number}2 {number}3 {number}4",
)


def lines(size: int, seed: int = 0) -> Iterator[str]:
    """Lines of a log, about `size` bytes of them."""
    draw, written = random.Random(seed), 0
    while written < size:
        name = draw.choice(NAMES)
        facts = {
            "time": f"2026-11-{draw.randint(10, 28)} {draw.randint(10, 23)}:00:{draw.random():.3f}",
            "hash": f"{draw.getrandbits(40):010x}",
            "number": draw.randint(100, 999),
            "word": draw.choice(WORDS),
            "name": name,
            "mail": f"{name.split()[0].lower()}{draw.randint(1, 99)}@{draw.choice(WORDS)}.org",
        }
        line = draw.choice(LINES).format(**facts) + "\n"
        written += len(line.encode())
        yield line


def redacted(shards: str, log: Path, unit: str) -> Cost:
    command = (sys.executable, "-m", "ane_moe", "redact", shards, "--file", str(log))
    cost = cost_of((*command, "--beside", "--unit", unit))
    if cost.code:
        sys.exit(cost.stderr[-2000:])
    return cost


def main(
    shards: Annotated[str, typer.Option(help="Folder of a conversion, or demo.")] = "demo",
    megabytes: Annotated[str, typer.Option(help="Sizes of logs, in MB.")] = "5,10,20",
    unit: Annotated[str, typer.Option(help="What is looked at by itself.")] = "line",
) -> None:
    """Print a table, and what a log of 1 GB would take at the rate of the largest."""
    print("| log | wall | CPU | MB per CPU minute | peak memory |\n|---:|---:|---:|---:|---:|")
    rate = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "a.log"
        for size in map(float, megabytes.split(",")):
            log.write_text("".join(lines(round(size * MB))), encoding="utf-8")
            cost = redacted(shards, log, unit)
            rate = 60 * size / cost.cpu_seconds
            figures = f"{cost.seconds:,.0f} s | {cost.cpu_seconds:,.0f} s | {rate:.1f}"
            print(f"| {size:g} MB | {figures} | {cost.peak_bytes / MB:,.0f} MB |", flush=True)
    print(f"\n1 GB at the last rate: {1000 / rate / 60:.1f} CPU hours (not run)")


if __name__ == "__main__":
    typer.run(main)
