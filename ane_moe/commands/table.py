"""Every command, in the order of the help, with two examples of how it is called and what for: a
row adds a command, whose function has its name and is in the file of its name."""

from importlib import import_module
from typing import Any

EXAMPLES: dict[str, tuple[tuple[str, str], tuple[str, str]]] = {
    "plan": (
        ("ane-moe plan Qwen/Qwen3-30B-A3B", "from its config.json on the Hub, for an M4 Max"),
        ("ane-moe plan model/ --target m1 --compress int8", "a local folder, one weight format"),
    ),
    "convert": (
        ("ane-moe convert demo out --golden", "the built-in model, with what verify compares"),
        (
            "ane-moe convert model/ out --compress lut4 --cluster tcp://host:8786",
            "by the workers of a Dask scheduler, which see both folders",
        ),
    ),
    "verify": (
        ("ane-moe verify out", "against the golden in it; exit 1 if a gate fails"),
        ("ane-moe verify hf://owner/name --quick", "a first look at a conversion on the Hub"),
    ),
    "generate": (
        ('ane-moe generate out --prompt "Once upon"', "continue a text, greedily"),
        (
            'ane-moe generate out --chat --prompt "Why?" --temperature 0.7 --seed 0',
            "answer in the model's chat template, by repeatable draws",
        ),
    ),
    "chat": (
        ("ane-moe chat out", "talk with it on a terminal; /help says what can be typed"),
        (
            'ane-moe chat demo --system "Write Python" --temperature 0 --json',
            "the built-in model: lines of a pipe in, an object for each answer out",
        ),
    ),
    "serve": (
        ("ane-moe serve out", "OpenAI's API and a page on http://127.0.0.1:8000"),
        (
            "ane-moe serve demo --port 9000 --waiting 4",
            "the built-in model on another port; who waits longer is told to come back",
        ),
    ),
    "redact": (
        ('ane-moe redact demo "Mail Jane Doe at jane@example.org"', "by the built-in filter"),
        (
            "ane-moe redact out --mapping table.json --file notes.txt",
            "numbered placeholders, and what they stand for",
        ),
    ),
    "unredact": (
        ("ane-moe unredact --mapping table.json --file answer.txt", "restore a file's text"),
        ("ane-moe unredact --mapping table.json --beside --file a.txt b.txt", "a file beside each"),
    ),
    "bench": (
        ("ane-moe bench out --save bench.json", "time everything, keep the figures"),
        ("ane-moe bench out --against bench.json --tokens 64", "compare with figures kept before"),
    ),
    "report": (
        ("ane-moe report out", "verify, and write out/report.html"),
        (
            "ane-moe report out --no-verify --bench bench.json --markdown card.md",
            "of known figures",
        ),
    ),
    "push": (
        ("ane-moe push out owner/name", "verify, write the card, send what is not there yet"),
        ("ane-moe push out owner/name --dry-run", "look at the card first"),
    ),
    "pull": (
        ("ane-moe pull owner/name out", "fetch a conversion, check every file"),
        ("ane-moe pull owner/name@v1.0 out --json", "one revision of it"),
    ),
    "trace": (
        ("ane-moe trace out --text corpus.txt --out trace.npz", "which experts the shards choose"),
        (
            "ane-moe trace demo --text corpus.txt --out trace.npz --max-tokens 512",
            "the same of a checkpoint, in fp32",
        ),
    ),
    "group": (
        ("ane-moe group trace.npz --out groups.json", "as many to a function as runs fastest"),
        ("ane-moe group trace.npz --out groups.json --experts-per-function 8", "eight each"),
    ),
    "cache-study": (
        ("ane-moe cache-study trace.npz", "hits and loads by policy and capacity, beside the best"),
        (
            "ane-moe cache-study trace.npz --capacities 0.25 --plot study.svg",
            "of a quarter of the experts, with a plot",
        ),
    ),
    "align": (
        ("ane-moe align out --text corpus.txt --out adapters.npz", "fit them to a text"),
        (
            "ane-moe align out --text corpus.txt --distances 1,2 --out adapters.npz",
            "for guesses of several layers ahead",
        ),
    ),
    "vectors": (
        ("ane-moe vectors out vectors", "of 20 tokens, the last 4 one by one"),
        ("ane-moe vectors out vectors --tokens 200 --decode 0", "of a prompt of several calls"),
    ),
    "inspect": (
        ("ane-moe inspect out/attn/layer_00.mlpackage", "functions, inputs, states, formats"),
        (
            "ane-moe inspect model.mlpackage --ops --placement",
            "the program, and where it would run",
        ),
    ),
    "run": (
        ("ane-moe run model.mlpackage --input x=x.npy --output results", "of given inputs"),
        ("ane-moe run model.mlpackage --seed 0 --trace", "of drawn ones, every intermediate"),
    ),
    "diff": (
        ("ane-moe diff before.mlpackage after.mlpackage", "the first operation where they part"),
        ("ane-moe diff model.mlpackage --precision-b engine", "by the engine's arithmetic"),
    ),
    "probe": (
        ("ane-moe probe", "write placement-feedback.json here"),
        ("ane-moe probe results --json", "into a folder, and print it"),
    ),
    "demo": (
        ("ane-moe demo checkpoint", "write the built-in language model to look at"),
        ("ane-moe demo two-bit ~/models/two-bit", "another of the built-in models"),
    ),
    "cache": (
        ("ane-moe cache", "what is kept, and how large"),
        ("ane-moe cache --remove s3://bucket/out", "remove what was fetched of an address"),
    ),
    "doctor": (
        ("ane-moe doctor", "what is installed, and what can be measured on this machine"),
        ("ane-moe doctor --json", "the same for a bug report"),
    ),
}


def command_of(name: str) -> Any:
    """The function of a command."""
    own = name.replace("-", "_")
    return getattr(import_module(f"ane_moe.commands.{own}"), own)


def examples_text(name: str) -> str:
    """The end of a command's help."""
    lines = [line for call, why in EXAMPLES[name] for line in (f"  {call}", f"      {why}")]
    return "\n".join(("\b", "Examples:", *lines))
