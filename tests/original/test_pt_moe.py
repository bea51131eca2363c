"""The reference model of parallel tracks, against Hugging Face's Mixtral and by what has to hold of
tracks whatever they compute."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ane_moe.original.paper_blocks import SparseMlp
from ane_moe.original.pt_moe import PtMoeForCausalLM
from tests.models import CONFIGS, make_model
from tests.zoo import FULL, SLIDING

IDS = torch.arange(3, 30)[None]
ROUNDING = 2e-5


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits[0]


def dense(**fields) -> PtMoeForCausalLM:
    return make_model("pt_moe", mlp_layer_types=["dense"] * 4, num_hidden_layers=4, **fields)


def test_one_track_with_windows_and_experts_everywhere_is_mixtral() -> None:
    kinds = {"layer_types": [SLIDING] * 3, "mlp_layer_types": ["sparse"] * 3}
    model = make_model("pt_moe", num_tracks=1, num_hidden_layers=3, **kinds)
    fields = CONFIGS["pt_moe"] | {
        "num_hidden_layers": 3,
        "num_local_experts": model.config.num_experts,
        "intermediate_size": model.config.moe_intermediate_size,
    }
    names = {name for name in fields if name.startswith("track_") or name == "num_tracks"}
    config = AutoConfig.for_model("mixtral", **{k: v for k, v in fields.items() if k not in names})
    mixtral = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    mixtral.load_state_dict(model.state_dict())
    assert (logits(mixtral) - logits(model)).abs().max() < ROUNDING


@torch.no_grad()
def test_one_track_is_one_layer_after_the_other_bit_for_bit() -> None:
    model = make_model("pt_moe", num_tracks=1)
    x = model.model.embed_tokens(IDS)
    for layer in model.model.layers:
        x = layer(x)
    assert torch.equal(model.lm_head(model.model.norm(x))[0], logits(model))


@pytest.mark.parametrize("tracks", [2, 4])
def test_equal_tracks_with_the_mean_are_one(tracks: int) -> None:
    one = make_model("pt_moe", num_tracks=1)
    fields = {"num_attention_heads": 4 * tracks, "num_key_value_heads": 2 * tracks}
    many = make_model("pt_moe", num_tracks=tracks, **fields)
    for block, own in zip(many.model.blocks, one.model.blocks, strict=True):
        for numbers in block:
            for mine, theirs in zip(numbers, own[0], strict=True):
                many.model.layers[mine].load_state_dict(one.model.layers[theirs].state_dict())
    for name in ("embed_tokens", "norm"):
        getattr(many.model, name).load_state_dict(getattr(one.model, name).state_dict())
    many.lm_head.load_state_dict(one.lm_head.state_dict())
    assert torch.equal(logits(many), logits(one))


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_the_order_of_tracks_does_not_matter(reduce: str) -> None:
    model = make_model("pt_moe", track_reduce=reduce)
    before = logits(model)
    model.model.blocks = [block[::-1] for block in model.model.blocks]
    assert (logits(model) - before).abs().max() < ROUNDING


@torch.no_grad()
def test_depth_0_with_the_sum_is_the_unsplit_layer() -> None:
    """Heads and widths dealt out to the tracks; norms are the same in all."""
    whole, split = dense(num_tracks=1, intermediate_size=80), dense(num_tracks=2, track_depth=0)
    for name in ("embed_tokens", "norm"):
        getattr(split.model, name).load_state_dict(getattr(whole.model, name).state_dict())
    split.lm_head.load_state_dict(whole.lm_head.state_dict())
    for layer, numbers in zip(whole.model.layers, split.model.blocks, strict=True):
        for track, (number,) in enumerate(numbers):
            for name, value in layer.state_dict().items():
                outward = name.endswith(("o_proj.weight", "down_proj.weight"))
                own = value if "norm" in name else value.chunk(2, int(outward))[track]
                split.model.layers[number].get_parameter(name).copy_(own)
    assert (logits(split) - logits(whole)).abs().max() < ROUNDING


@torch.no_grad()
@pytest.mark.parametrize("kind", [SLIDING, FULL])
def test_what_a_layer_sees(kind: str) -> None:
    model = make_model("pt_moe", layer_types=[kind] * 6)
    layer, window, last = model.model.layers[0], model.config.sliding_window, 20
    x = torch.randn(1, last + 1, model.config.hidden_size)
    before = layer(x)[0, last]
    for back, seen in ((window - 1, True), (window, kind == FULL)):
        changed = x.clone()
        changed[0, last - back] += 1
        assert torch.equal(layer(changed)[0, last], before) != seen
    # Without rotation nothing knows where the first token stands.
    assert torch.equal(layer(x, 37), layer(x)) == (kind == FULL)


@torch.no_grad()
def test_no_token_is_dropped_when_all_choose_one_expert() -> None:
    model = make_model("pt_moe", num_experts_per_tok=1)
    block = next(one for one in model.modules() if isinstance(one, SparseMlp))
    x = torch.randn(50, model.config.hidden_size)
    x[:, 0] = 1
    block.gate.weight.zero_()[4, 0] = 100
    _, weights, chosen = block.gate(x)
    assert (chosen == 4).all() and (weights == 1).all()
    gate, up = (x @ block.experts.gate_up_proj[4].T).chunk(2, -1)
    expected = (torch.nn.functional.silu(gate) * up) @ block.experts.down_proj[4].T
    assert (block(x) - expected).abs().max() < ROUNDING and expected.any(-1).all()
