"""Record the graphs whose compute plans were published: write the file of recorded graphs.

    python scripts/record_measured_graphs.py

The plans are those of github.com/erwinzhang7/coreml-compute-placement (results,
placement-m4-pro.json and -m5-max.json, compute units CPU_AND_NE, coremltools 9.0). This converts
the same architectures at the same sizes (batch 16, fp16, macOS 15) with random weights, which
decide nothing about placement, and keeps operations, shapes and literals. A graph is taken only if
it has as many operations as were counted, and if every operation, read back from the file, gives
the placement rules the facts that the package gives. Takes two minutes and 3 GB.
"""

import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ane_moe.coreml_tools import ct  # noqa: E402
from ane_moe.mlprogram.program import Program  # noqa: E402
from ane_moe.mlprogram.reader import read_program  # noqa: E402
from ane_moe.placement.facts import function_facts  # noqa: E402
from ane_moe.placement.published.points import PLANS  # noqa: E402
from ane_moe.placement.published.recorded import GRAPHS, as_text, measured_graph, record  # noqa: E402

IMAGES = (16, 3, 224, 224)


class Features(torch.nn.Module):
    """One vector for each item of the batch, as the published packages give."""

    def __init__(self, model: torch.nn.Module, reduce: Callable[[Any], torch.Tensor]):
        super().__init__()
        self.model, self.reduce = model.eval(), reduce

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.reduce(self.model(x))


def pooled(output: Any) -> torch.Tensor:
    return output.pooler_output.flatten(1)


def mean(output: Any) -> torch.Tensor:
    return output.last_hidden_state.mean(1)


def resnet50() -> tuple[Features, torch.Tensor]:
    return Features(transformers.ResNetModel(transformers.ResNetConfig()), pooled), torch.randn(
        IMAGES
    )


def mobilenet() -> tuple[Features, torch.Tensor]:
    config = transformers.MobileNetV2Config()
    return Features(transformers.MobileNetV2Model(config), pooled), torch.randn(IMAGES)


def whisper() -> tuple[Features, torch.Tensor]:
    """The encoder of whisper-tiny."""
    config = transformers.WhisperConfig(
        d_model=384,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=1536,
        decoder_ffn_dim=1536,
        attn_implementation="eager",
    )
    model = transformers.WhisperModel(config).get_encoder()
    return Features(model, mean), torch.randn(16, 80, 3000)


def siglip() -> tuple[Features, torch.Tensor]:
    """The vision tower of siglip-base-patch16-224."""
    config = transformers.SiglipVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=224,
        patch_size=16,
        attn_implementation="eager",
    )
    return Features(transformers.SiglipVisionModel(config), mean), torch.randn(IMAGES)


def distilbert() -> tuple[Features, torch.Tensor]:
    config = transformers.DistilBertConfig(attn_implementation="eager")
    tokens = torch.randint(1, 1000, (16, 128), dtype=torch.int32)
    return Features(transformers.DistilBertModel(config), mean), tokens


MODELS = (resnet50, mobilenet, whisper, siglip, distilbert)
HALF_INPUTS = ("siglip",)  # its published recipe names no type, and coremltools then takes fp16


def converted(name: str, module: Features, x: torch.Tensor, folder: Path) -> Program:
    whole = x.dtype == torch.int32
    dtype = {"dtype": np.int32 if whole else np.float32} if name not in HALF_INPUTS else {}
    with torch.no_grad():
        traced = torch.jit.trace(module, x, strict=False)
    model = ct.convert(
        traced,
        inputs=[ct.TensorType("x", shape=x.shape, **dtype)],
        skip_model_load=True,
        minimum_deployment_target=ct.target.macOS15,
        compute_precision=ct.precision.FLOAT16,
    )
    model.save(str(folder / f"{name}.mlpackage"))
    return read_program(folder / f"{name}.mlpackage")


def facts(program: Program) -> Iterator[tuple[Any, ...]]:
    """What the rules see of each operation, the sizes of its weights with it."""
    for op in function_facts(program, program.default_function).ops:
        yield op.facts, op.flops, op.reduction, op.sources, [nbytes for _, nbytes in op.parts]


def main() -> int:
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        programs = {
            make.__name__: converted(make.__name__, *make(), Path(folder)) for make in MODELS
        }
        graphs = {name: record(program) for name, program in programs.items()}
        for name, graph in graphs.items():
            if (count := len(graph["order"])) != PLANS[name].operations:
                sys.exit(f"{name}: {count} operations, {PLANS[name].operations} were measured")
        temporary = GRAPHS.with_name(f".{GRAPHS.name}.tmp")
        temporary.write_text(as_text(graphs))
        os.replace(temporary, GRAPHS)
        for name, program in programs.items():
            if list(facts(program)) != list(facts(measured_graph(name))):
                sys.exit(f"{name}: the rules would see other facts in the file than in the package")
            print(f"{name}: {len(graphs[name]['operations'])} distinct operations")
    return 0


if __name__ == "__main__":
    sys.exit(main())
