"""How many experts a function has to hold to be placed on the engine: print the table of
docs/placement.md, or put it there.

    python scripts/placement_design.py [--write]

By Core ML's own estimates for one token (ane_moe/forecast/design.py), from the sizes that the
families' configurations give. Nothing is measured.
"""

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from transformers import AutoConfig  # noqa: E402

from ane_moe.families import describe_config  # noqa: E402
from ane_moe.forecast.design import Design, design  # noqa: E402
from ane_moe.placement.targets import find_target  # noqa: E402
from scripts.doc_page import PagePart  # noqa: E402

TABLE = PagePart("placement.md", "design")
CHIPS, SYSTEM = ("m1", "m4", "m5", "m6"), 27
PRICE_MS = 0.25
# Hidden size, width of an expert, experts, heads, KV heads, size of a head: of the model cards.
MODELS = {
    "granite-3.1-3b-a800m": ("granitemoe", 1536, 512, 40, 24, 8, 64),
    "Qwen3-30B-A3B": ("qwen3_moe", 2048, 768, 128, 32, 4, 128),
    "OLMoE-1B-7B": ("olmoe", 2048, 1024, 64, 16, 16, 128),
    "Mixtral-8x7B": ("mixtral", 4096, 14336, 8, 32, 8, 128),
}


def config(family: str, d: int, width: int, experts: int, *heads: int) -> dict[str, Any]:
    """A configuration of one layer of these sizes, in the words of its family."""
    counts = dict(
        zip(("num_attention_heads", "num_key_value_heads", "head_dim"), heads, strict=True)
    )
    fields = {
        "hidden_size": d,
        "num_hidden_layers": 1,
        "intermediate_size": width,
        "moe_intermediate_size": width,
        "num_experts": experts,
        "num_local_experts": experts,
        "mlp_only_layers": [],
    }
    return AutoConfig.for_model(family, **fields, **counts).to_dict()


def table() -> str:
    lines = [
        f"| model | weights of an expert | {' | '.join(CHIPS)} |",
        f"|---|---|{'---|' * len(CHIPS)}",
    ]
    for name, (family, d, width, *rest) in MODELS.items():
        spec = describe_config(config(family, d, width, *rest), name)
        found = [design(spec, find_target(chip, SYSTEM)) for chip in CHIPS]
        cells = " | ".join(map(cell, found))
        lines.append(f"| {name} | {3 * d * width / 1e6:.1f} M | {cells} |")
    return "\n".join(lines)


def cell(found: Design) -> str:
    """The margin of a function with one expert, and what `auto` makes of it."""
    experts = (row for row in found.functions if row.is_one_expert and row.tokens == 1)
    (alone,) = {row.margin_ms[0] for row in experts}
    count = found.experts_per_function
    if count == 1:
        return f"1: {alone:+.2f} ms"
    together = count * (alone + PRICE_MS) - PRICE_MS
    return f"1: {alone:+.2f} ms, **{count}**: {together:+.2f} ms"


def main() -> int:
    text = table()
    if "--write" in sys.argv[1:]:
        TABLE.write(text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
