"""Write the tables of docs/models.md: what is supported, of which parts, and how near it is to
Hugging Face's own model; what is not, and why.

    python scripts/models_table.py [--check]

Only what stands between the markers is replaced. --check writes nothing and exits with 1 when the
page is stale; deviations, which a processor's rounding decides, are not looked at.
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ane_moe.checkpoints.checkpoint import open_checkpoint  # noqa: E402
from ane_moe.families import describe, load_family, supported  # noqa: E402
from ane_moe.families.missing import ELSEWHERE, MISSING  # noqa: E402
from ane_moe.model.spec import (  # noqa: E402
    BandSpec,
    GqaSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    RouterSpec,
    SharedGqaSpec,
)
from scripts.doc_page import PagePart  # noqa: E402
from tests.models import make_model, save_checkpoint  # noqa: E402
from tests.torch_model import TorchModel  # noqa: E402
from tests.zoo import ROWS  # noqa: E402

TABLES = PagePart("models.md", "models")
EXPERTS = re.compile(r"^class \w*(?:Experts|SparseMoeBlock|SparseMLP|MoE|Moe)\b", re.M)
IDS = np.random.default_rng(0).integers(3, 211, 24).tolist()
MIXERS = {
    "CcaSpec": "compressed convolutional attention",
    "ShortConvSpec": "short convolutions",
    "MlaSpec": "latent attention",
    "MoaSpec": "attention of experts",
    "DeltaNetSpec": "gated delta nets",
    "KdaSpec": "delta nets that decay by channel",
    "LightningSpec": "lightning attention",
    "Mamba2Spec": "Mamba-2",
    "MambaSpec": "Mamba",
}
KINDS: dict[type, str] = {
    BandSpec: "attention in a band",
    SharedGqaSpec: "attention to another layer's keys and values",
}
ROUTERS = {"EdaRouterSpec": "router with a state", "SparseMixerSpec": "sparse mixer"}


def with_experts() -> set[str]:
    """The model types of the installed transformers whose code has experts."""
    folder = Path(transformers.__file__).parent / "models"
    files = folder.glob("*/modeling_*.py")
    found = {file.parent.name for file in files if EXPERTS.search(file.read_text())}
    # A model whose text model is another one's, and the text model alone of one.
    return found | {"gemma4_text", "kimi_k25", "llama4_text", "mistral3", "qwen3_5_moe_text"}


def parts(spec: ModelSpec) -> str:
    """The parts of a model in words, those of its first layers first."""
    words: list[str] = []
    for layer in spec.layers:
        words += _mixer(layer.mixer) if layer.mixer else []
        if isinstance(layer.ffn, MlpSpec):
            words.append("dense layers")
    moes = [layer.ffn for layer in spec.layers if isinstance(layer.ffn, MoeSpec)]
    words += [*_router(moes[0].router), *_experts(moes[0])] if moes else []
    one_block = any(None in (layer.mixer, layer.ffn) for layer in spec.layers)
    words += ["one block in a layer"] if one_block else []
    groups = [layer.router_group for layer in spec.layers if layer.router_group is not None]
    words += ["routers shared by layers"] if len(set(groups)) < len(groups) else []
    norms = spec.layers[0].norms
    words += [f"norms {norms}"] if norms != "before" else []
    words += ["norm after experts"] if any(layer.ffn_norms for layer in spec.layers) else []
    words += ["halves side by side"] if spec.layers[0].parallel else []
    words += ["gated norms"] if spec.norm.gate_rank else []
    words += ["LayerNorm"] if spec.norm.kind == "layer" else []
    words += ["norms carried on"] if spec.layers[0].keeps else []
    words += ["weighed additions"] if spec.layers[0].nth else []
    words += ["affine residuals"] if spec.layers[0].affine else []
    words += ["experts whose sum a later layer adds"] if spec.layers[0].hands_on else []
    words += ["scaled layers"] if spec.layers[0].scaled else []
    words += ["capped scores"] if spec.head.softcap else []
    scales = (spec.embed_scale, spec.residual_scale, spec.shared_scale, spec.head.logit_scale)
    scaled = any(scale != 1 for scale in scales)
    return ", ".join(dict.fromkeys(words + (["multipliers"] if scaled else [])))


def _mixer(mixer: Any) -> list[str]:
    if not isinstance(mixer, GqaSpec):
        facts = {"windows": mixer.window, "an indexer": getattr(mixer, "indexer", None)}
        facts["growing queries"] = getattr(mixer, "grows", False)
        return [MIXERS[type(mixer).__name__], *(name for name, has in facts.items() if has)]
    facts = {
        KINDS.get(type(mixer), "attention"): True,
        "windows": mixer.window,
        "chunks": mixer.chunk,
        "a temperature": mixer.temperature,
        "layers without rotation": mixer.rope is None,
        f"q and k norms ({mixer.qk_norm})": mixer.qk_norm != "none",
        "sinks": mixer.sinks,
        f"{mixer.gate} gate": mixer.gate != "none",
        "biased gates": mixer.gate_bias,
        "clipping": mixer.clip_qkv,
        "normed values": mixer.v_norm,
        "keys as values": mixer.keys_are_values,
        "keys and values in 8 bits": mixer.rounded,
    }
    return [name for name, has in facts.items() if has]


def _router(router: Any) -> list[str]:
    if not isinstance(router, RouterSpec):
        return [ROUTERS[type(router).__name__]]
    facts = {
        router.score: True,
        "renormalised": router.renorm,
        "choice bias": router.bias,
        "choice by logits": router.by_logits,
        "groups": router.groups > 1,
        "capped logits": router.softcap,
        "weighed experts": router.weighed,
        "idle experts": router.idle,
    }
    return [name for name, has in facts.items() if has]


def _experts(moe: MoeSpec) -> list[str]:
    facts = {
        "a norm of the router": moe.router_norm,
        "clamped activation": moe.expert.clamp,
        "gates on what enters experts": moe.expert.gate_enters,
        "limits of the activation": moe.expert.limit,
        "GELU": moe.expert.activation == "gelu",
        "a dense MLP beside": moe.beside,
        "squares in place of gates": moe.expert.squared,
        "gated shared expert": moe.shared and moe.shared.gated,
        "shared expert": moe.shared and not moe.shared.gated,
    }
    return [name for name, has in facts.items() if has]


def tiny(family: str, folder: Path) -> tuple[ModelSpec, str]:
    """The architecture of a family's tiny model, and the largest deviation of our logits from
    Hugging Face's, both in fp32, over all settings of the test table."""
    worst, spec = 0.0, None
    variants = ROWS[family].variants if family in ROWS else {}
    for name, changes in {"": {}, **variants}.items():
        model = make_model(family, **changes)
        checkpoint = save_checkpoint(model, folder / family / (name or "usual").replace(" ", "-"))
        spec = spec or describe(open_checkpoint(checkpoint))[0]
        if spec.is_encoder or spec.tracks:
            return spec, "by `verify` alone"
        with torch.no_grad():
            expected = model(torch.tensor([IDS])).logits[0].numpy()
        worst = max(worst, float(np.abs(TorchModel(checkpoint).logits(IDS) - expected).max()))
    assert spec is not None
    return spec, f"{worst:.0e}"


def rows() -> list[str]:
    lines = ["| model_type | of | parts | deviation |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for family in supported():
            spec, deviation = tiny(family, Path(folder))
            about = (sys.modules[load_family(family).spec.__module__].__doc__ or "").split(":")[0]
            about = about.split("\n")[0].rstrip(",.")
            lines.append(f"| `{family}` | {about} | {parts(spec)} | {deviation} |")
    lines += ["", "| model_type | nearest | what is missing |", "|---|---|---|"]
    for name, (like, lacks) in sorted(MISSING.items()):
        lines.append(f"| `{name}` | {f'`{like}`' if like else ''} | {lacks} |")
    lines += ["", "| model_type | why it is none of these |", "|---|---|"]
    lines += [f"| `{name}` | {why} |" for name, why in sorted(ELSEWHERE.items())]
    return lines


def without_deviations(text: str) -> str:
    return re.sub(r"\d+e-\d+ \|$", "|", text, flags=re.M)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true")
    check, text = parser.parse_args().check, "\n".join(rows())
    if not check:
        TABLES.write(text)
    elif without_deviations(TABLES.text) != without_deviations(f"{text}\n"):
        sys.exit(f"{TABLES.path} is stale: python scripts/models_table.py")


if __name__ == "__main__":
    main()
