"""What grouped convolutions would be worth to a block of parallel tracks that is one graph: print,
for each projection of the paper's 6B model, the price of n convolutions and of one in n groups.

    python scripts/compare_track_forms.py

Prices are Core ML's own estimates, as in compare_forms.py; nothing is measured. Weights are of the
real sizes, and empty. Shapes are arXiv 2602.07306's, with the widths of families/pt_moe.py.
"""

import sys
import tempfile
from pathlib import Path

import coremltools as ct
import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import types

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ane_moe.families import published  # noqa: E402
from ane_moe.mlprogram.reader import read_program  # noqa: E402
from ane_moe.placement.facts import FunctionFacts, function_facts  # noqa: E402
from ane_moe.placement.rules import rule_book  # noqa: E402
from ane_moe.placement.targets import find_target  # noqa: E402
from scripts.compare_forms import SYSTEM, priced  # noqa: E402

CHIPS, MODEL = ("m1", "m4", "m6"), "pt-6b-d4"


def projections() -> dict[str, tuple[int, int]]:
    """Channels out and in of one track's matrices."""
    shape = published(MODEL)
    assert shape is not None
    d, heads = shape["hidden_size"], shape["num_attention_heads"] // shape["num_tracks"]
    own, width = heads * shape["head_dim"], shape["intermediate_size"]
    return {"q": (own, d), "o": (d, own), "gate, up": (width, d), "down": (d, width)}


def graph(tracks: int, out: int, given: int, tokens: int, grouped: bool) -> FunctionFacts:
    """Of tracks that stand side by side on one stream, or of streams that enter as one, track by
    track: what joins and cuts them is left out."""
    groups, number = (tracks, 1) if grouped else (1, tracks)
    spec = mb.TensorSpec((1, given * groups, 1, tokens), types.fp16)
    weight = np.zeros((out * groups, given, 1, 1), np.float16)

    @mb.program(input_specs=[spec], opset_version=ct.target.iOS18)
    def program(x):
        different = (weight + np.float16(track) for track in range(number))
        return tuple(mb.conv(x=x, weight=own, groups=groups) for own in different)

    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "graph.mlpackage"
        model = ct.convert(
            program,
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT16,
            skip_model_load=True,
        )
        model.save(str(path))
        return function_facts(read_program(path), "main")


def main() -> None:
    shape = published(MODEL)
    assert shape is not None
    tracks = shape["num_tracks"]
    print(f"| matrix | tokens | form | {' | '.join(CHIPS)} | rules met |")
    print("|" + "---|" * (4 + len(CHIPS)))
    for name, (out, given) in projections().items():
        for tokens in (1, 64):
            for grouped in (False, True):
                facts = graph(tracks, out, given, tokens, grouped)
                costs = " | ".join(f"{priced(facts, chip).ms:.3f}" for chip in CHIPS)
                rules = rule_book(find_target("m4", SYSTEM))
                met = {r.id for op in facts.ops for r in rules.matching("op", op.facts)}
                form = "one in groups" if grouped else f"{tracks} apart"
                print(f"| {name} | {tokens} | {form} | {costs} | {', '.join(sorted(met))} |")


if __name__ == "__main__":
    main()
