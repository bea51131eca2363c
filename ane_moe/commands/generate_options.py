"""The options of `ane-moe generate`, by what they are of; those of other commands too are in
options.py."""

from pathlib import Path
from typing import Annotated

import typer

# What is continued.
Prompt = Annotated[str | None, typer.Option(help="Text to continue.")]
PromptFile = Annotated[Path | None, typer.Option(help="File with the text to continue, UTF-8.")]
PromptIds = Annotated[str | None, typer.Option(help="Token ids to continue, as 1,2,3.")]
Embeddings = Annotated[
    Path | None,
    typer.Option(
        help="Embeddings to continue in place of a text's: floats (tokens, width).",
        metavar="FILE.npy",
    ),
]
Chat = Annotated[
    bool, typer.Option("--chat", help="Put the prompt into the checkpoint's chat template.")
]

# How far, and what comes out.
MaxTokens = Annotated[int, typer.Option(help="New tokens at most.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; may be given again.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout at the end.")]

# Experts that are guessed, and loaded ahead.
Ahead = Annotated[
    int | None,
    typer.Option(
        help="Guess the experts of so many layers ahead.",
        min=1,
        show_default="1, or as far as shards guess",
    ),
]
AheadIfItPays = Annotated[
    bool,
    typer.Option(
        "--ahead-if-it-pays",
        help="Load guessed experts only where that is expected to take less time.",
    ),
]
Contention = Annotated[
    float | None,
    typer.Option(
        help="ahead-if-it-pays: computing takes 1 + this as long meanwhile.",
        min=0,
        show_default="0.73",
    ),
]
Adapters = Annotated[
    Path | None,
    typer.Option(
        help="What `ane-moe align` fitted to this conversion.",
        metavar="FILE.npz",
        show_default=False,
    ),
]

# Other ways to take tokens.
SelfSpeculate = Annotated[
    int | None,
    typer.Option(
        help="Draft so many tokens by the first layers, and check them in one call.",
        metavar="N",
        show_default=False,
    ),
]
ExitLayer = Annotated[
    int | None,
    typer.Option(
        help="self-speculate: draft by the layers up to this one.",
        show_default="a quarter of them",
    ),
]
PinExperts = Annotated[
    int | None,
    typer.Option(
        help="CHANGES THE MODEL: after the prompt use only the experts that it chose most, so "
        "many in a layer.",
        metavar="N",
        show_default=False,
    ),
]
PinEvery = Annotated[
    int | None,
    typer.Option(help="pin-experts: choose them anew after so many tokens.", show_default="never"),
]
Roster = Annotated[
    int | None,
    typer.Option(
        help="Take each token this many times, by experts chosen with noise, and average.",
        metavar="N",
    ),
]
Tau = Annotated[
    float | None,
    typer.Option(help="roster: what the noise is multiplied by.", show_default="0.1"),
]
TauSchedule = Annotated[
    Path | None,
    typer.Option(help='roster: the same by layer, as {"0": 0.1}.', metavar="FILE.json"),
]
SkipLayers = Annotated[
    int, typer.Option(help="roster: no noise in so many first and last layers.", metavar="L")
]
