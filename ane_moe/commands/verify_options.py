"""The options of `ane-moe verify`, by what they are of."""

from pathlib import Path
from typing import Annotated

import typer

# What it is compared with.
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        help="Capture the golden from this checkpoint (as of `convert`) now, instead of "
        "reading the one in OUT."
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        help=(
            "Prompts for --checkpoint: text parted by lines of ---, or a .json list of texts "
            "or token ids."
        )
    ),
]
MinCosine = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Cosine every function must reach.",
        show_default="0.999 for fp16 weights, 0.97 compressed",
    ),
]
MinLogitCosine = Annotated[
    float | None,
    typer.Option(
        help="Mean cosine the whole model's logits must reach.",
        show_default="0.99 for fp16 weights, 0.9 compressed",
    ),
]

# How much is looked at, and by whom.
DecodeTokens = Annotated[
    int,
    typer.Option(
        min=0,
        help="Tokens for one-token calls where prefill covers all of them; 0 for no limit.",
    ),
]
Quick = Annotated[
    bool,
    typer.Option(
        "--quick", help="Look at a few layers, experts and prompts only; the result says which."
    ),
]
Fresh = Annotated[
    bool,
    typer.Option("--fresh", help="Do not go on with what a run that was broken off proved."),
]
Cluster = Annotated[
    str | None,
    typer.Option(
        help="Let the workers of this Dask scheduler, which see OUT or its address, prove the "
        "functions (see `convert`).",
        metavar="tcp://HOST:PORT|FILE.toml",
    ),
]

# What is looked at besides.
Against = Annotated[
    str | None,
    typer.Option(
        help=(
            "Also: each distinct part by the reference runtime and by this one, coreai or "
            "coreml, on the same inputs."
        ),
        metavar="RUNTIME",
        show_default=False,
    ),
]
ComputePlan = Annotated[
    bool,
    typer.Option(
        "--compute-plan",
        help="Also: the engine each operation runs on. Measured on macOS, else predicted.",
    ),
]
Target = Annotated[
    str, typer.Option(help="Chip to predict placement for: m1 ... m5-max, iphone-a17 ...")
]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        help="An operation type that may be off the engine; repeat for more.", metavar="OP"
    ),
]
RequireMeasured = Annotated[
    bool, typer.Option("--require-measured", help="Fail when placement can only be predicted.")
]

# Where results go.
Html = Annotated[Path | None, typer.Option(help="Also write the results as a page (see `report`).")]
