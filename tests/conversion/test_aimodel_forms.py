"""`--format aimodel` in the other forms that a conversion may have: goldens read back from the assets
are those of the packages, and `verify` passes by Core AI's runtime."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ane_moe.conversion.pipeline import convert
from ane_moe.conversion.plan import ConvertOptions
from ane_moe.formats.recipe import find_recipe
from ane_moe.verification.verify import verify
from tests.adapters import adapt
from tests.models import make_model, save_checkpoint

HAS_CORE_AI = importlib.util.find_spec("coreai_torch") is not None
pytestmark = [
    pytest.mark.skipif(not HAS_CORE_AI, reason="Core AI's packages are not installed"),
    pytest.mark.slow,
]
PROMPT = np.random.default_rng(0).integers(3, 211, 20).tolist()
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "a shared expert": ("qwen2_moe", {"routing": "sparse", "expert_tokens": (1, 16)}),
    "stored experts": ("qwen2_moe", {"routing": "stream", "expert_tokens": (1, 16)}),
    "two layers a shard": ("mixtral", {"layers_per_shard": 2}),
    "turned streams": ("mixtral", {"layout": "bct1", "state": "explicit"}),
    "parts of a layer": ("mixtral", {"max_shard_mb": 1}),
    "embeddings": ("mixtral", {"inputs": "embeds"}),
    "soft": ("mixtral", {"routing": "soft"}),
    "an adapter": ("mixtral", {"adapter_mode": "switch"}),
}


@pytest.mark.parametrize("form", FORMS)
def test_it_is_proved_right_by_core_ai(form: str, tmp_path: Path) -> None:
    family, options = FORMS[form]
    model = make_model(family)
    checkpoint = save_checkpoint(model, tmp_path / "checkpoint")
    adapters = ()
    if "adapter_mode" in options:
        adapt(model, tmp_path / "clerk", target_modules=["q_proj", "v_proj"])
        adapters = (str(tmp_path / "clerk"),)
    (tmp_path / "prompts.json").write_text(json.dumps([PROMPT]))
    shape = {"prefill": 16, "context": 64, "recipe": find_recipe("int8"), "adapters": adapters}
    goldens = []
    for package in ("mlpackage", "aimodel"):
        chosen, out = ConvertOptions(**shape, **options, format=package), tmp_path / package
        convert(checkpoint, out, chosen, golden=True, prompts=tmp_path / "prompts.json")
        paths = sorted(out.glob("golden_as_stored*.safetensors"))
        goldens.append({path.name: load_file(path) for path in paths})
    assert goldens[0].keys() == goldens[1].keys() and goldens[0]
    for name, golden in goldens[0].items():
        for key, value in golden.items():
            np.testing.assert_array_equal(value, goldens[1][name][key])
    for adapter in ((), *((Path(path),) for path in adapters)):
        report = verify(out, adapters=adapter)
        assert report.runtime == "coreai" and (report.passed or options.get("routing") == "soft")
