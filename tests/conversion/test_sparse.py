"""Whole conversions with sparse routing: text, cost of a token, damage; against Hugging Face and
masked routing."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ane_moe.conversion import planner as planning
from ane_moe.demo import demo_checkpoint
from ane_moe.errors import UserError
from ane_moe.loop.generation import GenerateOptions, generate
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from ane_moe.manifest import read_manifest
from tests.models import DECIDED, DECODERS, make_model, make_variant, save_checkpoint
from tests.verification.tiny import tiny_conversion

MARGIN = 1e-2  # where HF's best two logits are closer, fp16 may choose the other
MIN_DECIDED = 8  # ids to compare at the least, or the test says little
PROMPT = np.random.default_rng(0).integers(3, 211, 50).tolist()
BUCKETS = (1, 16)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def sparse(checkpoint: Path, out: Path, **options) -> Path:
    return tiny_conversion(
        checkpoint,
        out,
        **{"routing": "sparse", "expert_tokens": BUCKETS, "prefill": 16, "context": 96, **options},
    )


def of_model(model, folder: Path, **options) -> Path:
    return sparse(save_checkpoint(model, folder / "checkpoint"), folder / "out", **options)


def greedy(out: Path, prompt=PROMPT, count=32, **options) -> list[int]:
    session = Session(
        load_shards(out, "reference", expert_cache_bytes=options.pop("limit", None)), **options
    )
    return [piece.id for piece in generate(session, prompt, GenerateOptions(max_tokens=count))]


def hugging_face(model, prompt, count=32) -> tuple[list[int], np.ndarray]:
    """HF's greedy ids, and by how much it preferred each of them to the second best."""
    with torch.no_grad():
        output = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=count,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    best = [torch.topk(step[0], 2).values for step in output.logits]
    return output.sequences[0, len(prompt) :].tolist(), np.array(
        [float(first - second) for first, second in best]
    )


def assert_agree(ids, expected, margins):
    """Up to the first place where HF itself is nearly undecided; after it the texts may part."""
    decided = int(np.argmax(np.append(margins, 0) <= MARGIN))
    assert decided >= MIN_DECIDED and ids[:decided] == expected[:decided]


@pytest.mark.parametrize("family", DECODERS)
def test_a_family_generates_the_ids_of_hugging_face(family, tmp_path):
    model = make_model(family, seed=DECIDED.get(family, 0))
    assert_agree(greedy(of_model(model, tmp_path)), *hugging_face(model, PROMPT))


def test_groups_parts_explicit_state_and_the_other_layout_generate_them_too(tmp_path, monkeypatch):
    model = make_variant("qwen2_moe with windows")  # a dense layer, shared experts
    monkeypatch.setattr(planning, "MAX_WEIGHT_BYTES", 200_000)
    out = of_model(model, tmp_path, experts_per_function=7, state="explicit", layout="bct1")
    assert len(read_manifest(out).shards_of("experts", 1)) > 1
    assert_agree(greedy(out), *hugging_face(model, PROMPT))


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    return sparse(demo_checkpoint(), tmp_path_factory.mktemp("demo") / "sparse", context=256)


def test_the_built_in_model_chooses_the_200_ids_of_hugging_face_and_so_does_masked_routing(
    demo, tmp_path
):
    model = AutoModelForCausalLM.from_pretrained(demo_checkpoint(), dtype=torch.float32)
    prompt = AutoTokenizer.from_pretrained(demo_checkpoint())("def __init__(self, name")[
        "input_ids"
    ]
    masked = tiny_conversion(demo_checkpoint(), tmp_path / "masked", prefill=16, context=256)
    ids, margins = hugging_face(model, prompt, 200)
    clear = margins > MARGIN
    assert clear.sum() > 190
    for out in (demo, masked):
        logits = Session(load_shards(out, "reference")).prefill_logits(
            [*prompt, *ids[:-1]], by="decode"
        )
        np.testing.assert_array_equal(
            logits[len(prompt) - 1 :].argmax(1)[clear], np.array(ids)[clear]
        )
    assert_agree(greedy(demo, prompt, 200), ids, margins)
    assert_agree(greedy(masked, prompt, 200), ids, margins)


def test_neither_cache_limit_nor_concurrency_nor_prefetch_changes_the_ids(demo):
    one = max(load_shards(demo, "reference").cache.resident_bytes(key) for key in keys_of(demo))
    plain = greedy(demo, count=6)
    assert greedy(demo, count=6, limit=2 * one, concurrency=2) == plain
    assert greedy(demo, count=6, limit=5 * one, predictor="router") == plain


def keys_of(out: Path):
    shards = load_shards(out, "reference")
    groups = [group for layer in shards.experts.values() for group in layer.groups]
    return [group.key(tokens) for group in groups for tokens in group.functions]


def test_a_decode_step_reads_k_experts_of_each_layer_and_no_more(demo):
    session = Session(shards := load_shards(demo, "reference"))
    session.decode(7)
    manifest, cache = shards.manifest, shards.cache
    one = max(cache.resident_bytes(key) for key in keys_of(demo))
    ks = [facts["k"] for facts in manifest.moe.values()]
    assert cache.figures.misses == sum(ks) and cache.figures.bytes_loaded == sum(ks) * one
    experts = sum(facts["experts"] for facts in manifest.moe.values())
    assert sum(ks) < experts


def copy_of(demo: Path, folder: Path) -> Path:
    return Path(shutil.copytree(demo, folder / "copy"))


def test_a_missing_package_is_named(demo, tmp_path):
    out = copy_of(demo, tmp_path)
    shutil.rmtree(out / "experts/layer_02.mlpackage")
    with pytest.raises(UserError, match=r"layer_02\.mlpackage"):
        greedy(out)


def test_a_package_cut_short_is_an_error(demo, tmp_path):
    out = copy_of(demo, tmp_path)
    weights = next((out / "experts/layer_01.mlpackage").rglob("weight.bin"))
    weights.write_bytes(weights.read_bytes()[: -weights.stat().st_size // 2])
    with pytest.raises(UserError, match=r"weight\.bin"):
        greedy(out)


def test_a_function_the_package_lacks_is_named(demo, tmp_path):
    out = copy_of(demo, tmp_path)
    shutil.rmtree(out / "experts/layer_00.mlpackage")
    sparse(demo_checkpoint(), tmp_path / "other", context=256, expert_tokens=(1,))
    shutil.copytree(
        tmp_path / "other/experts/layer_00.mlpackage", out / "experts/layer_00.mlpackage"
    )
    with pytest.raises(
        UserError, match=r"layer_00.mlpackage lacks an expert function; found: expert_\d+_t16"
    ):
        greedy(out)


def test_a_gate_for_an_expert_no_package_holds_is_an_error(demo, tmp_path):
    out = copy_of(demo, tmp_path)
    manifest = read_manifest(out)
    shard = manifest.shards_of("experts", 0)[0]
    held = [function for function in shard.functions if not function.name.startswith("expert_000")]
    assert len(held) < len(shard.functions)
    broken = replace(
        manifest,
        shards=tuple(
            replace(each, functions=tuple(held)) if each is shard else each
            for each in manifest.shards
        ),
    )
    broken.write(out)
    with pytest.raises(UserError, match="choose an expert that no package holds; found: expert 0"):
        greedy(out)


def test_a_cache_smaller_than_one_expert_is_refused(demo):
    with pytest.raises(UserError, match=r"smaller than one expert function.*expert-cache-mb"):
        greedy(demo, limit=1000)
