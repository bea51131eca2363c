"""The golden of the model as it is stored, against Hugging Face on a checkpoint of these weights."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ane_moe.checkpoints.checkpoint import open_checkpoint
from ane_moe.conversion.pipeline import convert
from ane_moe.conversion.plan import ConvertOptions
from ane_moe.formats.recipe import find_recipe
from ane_moe.manifest import read_manifest
from ane_moe.opened import open_model
from ane_moe.original.capture import capture_golden
from ane_moe.original.golden import arrays_of, read_golden
from ane_moe.original.stored_weights import StoredTensors, stored_weights
from tests.models import make_model, save_checkpoint, save_fused
from tests.slow_set import slow_but

CASES = {
    "each expert": ("qwen3_moe", save_checkpoint, find_recipe("int8"), {}),
    "stacked, tied, multipliers": ("granitemoe", save_fused, find_recipe("lut4", rank=4), {}),
    "a carry": ("zaya", save_checkpoint, find_recipe("int8"), {}),
    "dispatched": ("lfm2_moe", save_checkpoint, find_recipe("lut4"), {"routing": "sparse"}),
    "one layer": ("mixtral", save_checkpoint, find_recipe("int8"), {"layers": (1,)}),
}


@pytest.mark.parametrize("case", slow_but([*CASES][:2], CASES))
def test_it_is_the_golden_of_a_checkpoint_that_holds_the_stored_weights(case, tmp_path):
    """The other way round: the weights go into files, and the ordinary capture reads them."""
    torch.set_num_threads(1)
    family, save, recipe, options = CASES[case]
    checkpoint = save(make_model(family).to(torch.bfloat16), tmp_path / "checkpoint")
    out = tmp_path / "out"
    convert(
        checkpoint,
        out,
        ConvertOptions(recipe=recipe, prefill=0, context=64, **options),
        golden=True,
    )
    manifest, model = read_manifest(out), open_model(checkpoint)
    stored = StoredTensors(model, out, manifest)
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.json").write_text(json.dumps(stored.config))
    with stored.opened([*stored.origins]) as tensors:
        save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    found = read_golden(out / "golden_as_stored.safetensors")
    prompts, again = [list(ids) for ids in found.prompts], tmp_path / "again.safetensors"
    experts = manifest.routing == "sparse"
    capture_golden(
        open_checkpoint(copy),
        layers=manifest.layers,
        prompts=prompts,
        out=again,
        context=manifest.context,
        experts=experts,
    )
    expected = read_golden(again)
    assert np.array_equal(found.logits, expected.logits)
    for layer in manifest.layers:
        pairs = arrays_of(found.layers[layer]), arrays_of(expected.layers[layer])
        assert pairs[0].keys() == pairs[1].keys()
        assert all(np.array_equal(pairs[0][name], pairs[1][name]) for name in pairs[0])
    errors = errors_by_hand(model, out, manifest)
    assert errors and all(
        manifest.compression[role]["relative_error"] == pytest.approx(error, rel=1e-5)
        for role, error in errors.items()
    )


def errors_by_hand(model, out, manifest):
    """Relative L2 by role, in fp64."""
    sums = {}
    for weight in stored_weights(manifest.shards, out):
        source = model.sources[weight.name]
        source = source if weight.rows is None else source.part(*weight.rows)
        original = model.checkpoint.read(source).astype(np.float64)
        if source.role:
            error = weight.value.reshape(original.shape) - original
            own = sums.setdefault(source.role, np.zeros(2))
            own += (error**2).sum(), (original**2).sum()
    return {role: np.sqrt(error / total) for role, (error, total) in sums.items()}
