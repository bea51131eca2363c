"""The options of `ane-moe convert`, by what they are of; other commands have them with other help,
if at all."""

from pathlib import Path
from typing import Annotated, Literal

import typer

# What is read, and what is written.
Checkpoint = Annotated[
    Path,
    typer.Argument(
        help="A Hugging Face model folder, a GGUF file, the address of one, "
        "OWNER/NAME[@REVISION] on the Hub, or `demo`.",
        metavar="CHECKPOINT",
    ),
]
Out = Annotated[
    Path,
    typer.Argument(help="The folder to write, or an address: s3://BUCKET/OUT.", metavar="OUT"),
]
Format = Annotated[
    Literal["mlpackage", "aimodel"],
    typer.Option("--format", help="mlpackage: for Core ML. aimodel: for Core AI (macOS 27)."),
]
IgnoreTensors = Annotated[
    list[str] | None,
    typer.Option(
        help="Leave out tensors that the model does not need; repeat for more.",
        metavar="PATTERN",
    ),
]
Layers = Annotated[
    str | None, typer.Option(help="Convert only these, such as 0-3 or 0,5.", metavar="LIST")
]
AdapterMode = Annotated[
    Literal["merge", "switch"],
    typer.Option(
        help="merge: into the weights. switch: beside them, each with functions of its own, "
        "for `generate --adapter NAME`."
    ),
]

# Functions: what they take, and what they keep.
State = Annotated[
    Literal["mlstate", "explicit"],
    typer.Option(help="KV cache as Core ML state, or as inputs and outputs."),
]
Inputs = Annotated[
    Literal["ids", "embeds"],
    typer.Option(help="embeds: embeddings enter; the embedding table is left out."),
]
Layout = Annotated[
    Literal["bc1s", "bct1"],
    typer.Option(help="Axis order of the streams: [1,C,1,T] or [1,C,T,1]."),
]
Prefill = Annotated[int, typer.Option(help="Tokens of a prefill call; 0: decode functions only.")]
Lengths = Annotated[
    str | None,
    typer.Option(
        help="encoders: token counts to make functions for.",
        metavar="LIST",
        show_default="32,128,512",
    ),
]
RingCaches = Annotated[
    bool,
    typer.Option(
        "--ring-caches",
        help="Caches no longer than a layer's window. [tracks: always]",
    ),
]
StreamScale = Annotated[
    str,
    typer.Option(
        help="Divide hidden states by N, a power of two, which keeps them inside fp16 and "
        "changes no result; auto: by what a golden or a calibration shows a need for.",
        metavar="auto|off|N",
    ),
]

# Experts: how they are computed, chosen and guessed.
Routing = Annotated[
    Literal["masked", "soft", "sparse", "stream"],
    typer.Option(
        help="masked: all experts, exact top-k gates. sparse: one function per expert, "
        "called by the host. stream: experts in a store, read when they are chosen. "
        "soft: the full softmax, another function than the model's."
    ),
]
ExpertTokens = Annotated[
    str, typer.Option(help="sparse: token counts to make expert functions for.", metavar="LIST")
]
ExpertsPerFunction = Annotated[
    str | None,
    typer.Option(
        help="sparse: experts computed by one function; auto: as many as --target takes to "
        "place it. [default: 1, or auto with --target]",
        metavar="N|auto",
    ),
]
Grouping = Annotated[
    Path | None,
    typer.Option(
        help="sparse: the experts of each function, as `ane-moe group` wrote them.",
        metavar="FILE.json",
    ),
]
Early = Annotated[
    Path | None,
    typer.Option(
        help="sparse, stream: let attention shards guess experts of later layers, by what "
        "`ane-moe align` fitted to a conversion of this model.",
        metavar="FILE.npz",
        show_default=False,
    ),
]
Ahead = Annotated[
    int | None,
    typer.Option(help="early: of so many layers ahead.", min=1, show_default="1"),
]
Roster = Annotated[
    bool,
    typer.Option("--roster", help="Let `generate --roster` disturb the choice of experts."),
]

# Shards: where the model is cut.
MaxShardMb = Annotated[int, typer.Option(help="Split MoE layers into shards of at most this size.")]
LayersPerShard = Annotated[
    str | None,
    typer.Option(
        help="masked, dense: this many whole layers in one shard, if --max-shard-mb allows; "
        "auto: as many as --target takes. [default: 1, or auto with --target]",
        metavar="N|auto",
    ),
]
Tracks = Annotated[
    Literal["apart", "packed"],
    typer.Option(help="Parallel tracks: a package for each, or one for those of a block."),
]

# Weights: how they are stored.
Compress = Annotated[
    str,
    typer.Option(
        help="Weight format, preset (safe, small, tiny) or .toml recipe; as-stored: the codes "
        "of a quantised checkpoint, carried over.",
        metavar="FORMAT",
    ),
]
LutGroup = Annotated[
    Literal["8", "16", "32", "tensor"] | None,
    typer.Option(help="Output channels that share a palette."),
]
LutVector = Annotated[
    Literal["2", "4"] | None, typer.Option(help="Weights that a palette's entry stands for.")
]
RecoverRank = Annotated[
    int | None,
    typer.Option(help="Singular directions of each matrix to keep apart in fp16.", metavar="R"),
]
Calibrate = Annotated[
    str | None,
    typer.Option(help="Text that shows which inputs matter: a file, or `builtin`.", metavar="FILE"),
]
BudgetMb = Annotated[
    float | None,
    typer.Option(help="Choose formats so that all weights take this many MB.", min=0.001),
]
MinCosine = Annotated[
    float | None,
    typer.Option(help="Choose the smallest formats that keep this cosine.", min=0.0, max=1.0),
]

# The chip that it is for.
Target = Annotated[
    str | None,
    typer.Option(
        help="The chip to choose sizes for, and whose placement rules to warn of. [default: "
        "m4-max, for warnings alone]",
        metavar="CHIP",
    ),
]
System = Annotated[
    int | None,
    typer.Option(
        "--os",
        help="The system whose placement rules to warn of: 15, 26 or 27.",
        show_default="26",
    ),
]
AllowCpu = Annotated[
    bool,
    typer.Option(
        "--allow-cpu",
        help="Weight formats that take the model off the engine of --target, too.",
    ),
]

# How it is carried out.
Cluster = Annotated[
    str | None,
    typer.Option(
        help="Let the workers of this Dask scheduler convert, instead of processes here, or "
        "those of jobs that a .toml file has a batch system begin.",
        metavar="tcp://HOST:PORT|FILE.toml",
    ),
]
Workers = Annotated[int, typer.Option(help="Processes that convert layers side by side.", min=1)]
Golden = Annotated[
    bool, typer.Option("--golden", help="Also capture the original model's outputs.")
]
Prompts = Annotated[
    Path | None,
    typer.Option(help="Prompts for --golden: text parted by lines of ---, or .json texts or ids."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace another conversion in OUT.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the plan; read and write no weights.")
]
