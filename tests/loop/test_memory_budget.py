"""What a limit leaves for experts: by hand, and kept by a process of its own."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ane_moe.conversion.pipeline import convert
from ane_moe.conversion.plan import ConvertOptions
from ane_moe.errors import UserError
from ane_moe.formats.recipe import FP16
from ane_moe.loop.expert_store import READERS
from ane_moe.loop.memory_budget import CALL_BYTES, budget_of
from ane_moe.manifest import read_manifest
from tests.models import make_model, save_checkpoint

WIDE = {  # 128 experts of 1.5 MB, 196 MB together
    "vocab_size": 61,
    "hidden_size": 512,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "num_hidden_layers": 2,
    "moe_intermediate_size": 512,
    "num_experts": 64,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [],
}
MB = 1_000_000
LIMIT = 20 * MB


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    checkpoint = save_checkpoint(make_model("qwen3_moe", **WIDE), folder / "checkpoint")
    options = ConvertOptions(
        routing="stream", context=64, prefill=8, expert_tokens=(1, 4), recipe=FP16
    )
    convert(checkpoint, folder / "out", options)
    return folder / "out"


def test_the_budget_adds_up_by_hand(large):
    manifest = read_manifest(large)
    record = 3 * 2 * 512 * 512
    caches = 2 * (2 * 2 * 16 * 64)  # two layers: keys and values of one head, fp16
    scores = 2 * 61
    packages = sum(shard.weight_bytes for shard in manifest.shards if shard.store is None)
    table = 2 * 61 * 512
    budget = budget_of(manifest.shards, table, LIMIT)
    assert budget.packages == packages and budget.reading == READERS * CALL_BYTES
    assert budget.caches == caches + scores and budget.expanded == 0
    left = LIMIT - packages - table - caches - scores - READERS * CALL_BYTES
    assert budget.experts == left and budget.all == LIMIT
    assert budget.fitting == math.floor(left / record) and budget.total == 128
    assert budget_of(manifest.shards, table, 1 << 40).experts == 128 * record
    with pytest.raises(
        UserError, match=r"holds no expert .* give --memory-mb (\d+) or more"
    ) as found:
        budget_of(manifest.shards, table, LIMIT - left)
    needed = int(str(found.value).rsplit("--memory-mb ")[1].split()[0])
    assert budget_of(manifest.shards, table, needed * MB).fitting >= 1


RUN = """
import json, resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from ane_moe.runtime.reference import runtime
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
small = Session(load_shards(Path(sys.argv[2]), "reference", memory_mb=1000))
small.prefill([3, 4, 5] * 5)  # what any session takes of libraries
del small
before = peak()
session = Session(load_shards(Path(sys.argv[1]), "reference", memory_mb=float(sys.argv[3])))
for token in json.loads(sys.argv[4]):
    session.decode(token)
print(json.dumps([peak() - before, session.figures.cache.bytes_loaded]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are counted in kilobytes")
def test_a_model_ten_times_larger_than_the_limit_stays_within_it(large, tmp_path):
    sizes = WIDE | {"moe_intermediate_size": 8, "num_experts": 4, "hidden_size": 32}
    checkpoint = save_checkpoint(make_model("qwen3_moe", **sizes), tmp_path / "checkpoint")
    options = ConvertOptions(
        routing="stream", context=64, prefill=8, expert_tokens=(1, 4), recipe=FP16
    )
    convert(checkpoint, tmp_path / "out", options)
    experts = sum(shard.weight_bytes for shard in read_manifest(large).shards if shard.store)
    assert experts > 9.8 * LIMIT
    ids = np.random.default_rng(0).integers(3, 61, 60).tolist()
    given = [str(large), str(tmp_path / "out"), str(LIMIT / MB), json.dumps(ids)]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *given], capture_output=True, text=True, check=True
    )
    grown, loaded = json.loads(done.stdout.splitlines()[-1])
    assert loaded > 5 * LIMIT  # it was read again and again
    assert grown <= LIMIT
