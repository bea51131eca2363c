"""Routers that layers share, and experts in every n-th layer."""

import math
from pathlib import Path

import pytest
import torch

from ane_moe.checkpoints.checkpoint import open_checkpoint
from ane_moe.errors import UserError
from ane_moe.families import describe, describe_config
from ane_moe.families.mm1_moe import published
from ane_moe.forecast.outlook import weights_in_shards
from ane_moe.model.spec import MlpSpec, ModelSpec, MoeSpec
from ane_moe.model.weight import EMBEDDING, WeightName
from tests.models import edit_config, make_model, read_config, save_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    return save_checkpoint(make_model("omni_moe"), tmp_path_factory.mktemp("omni"))


def weights(spec: ModelSpec) -> int:
    return sum(math.prod(row.shape) for _, row in spec.distinct_weights())


def test_layers_of_a_group_read_one_tensor(folder: Path) -> None:
    _, sources = describe(open_checkpoint(folder))
    for kind in ("weight", "bias"):
        names = [WeightName(layer, "ffn", None, f"router.{kind}") for layer in range(3)]
        keys = [sources[name].key for name in names]
        assert keys == [f"model.routers.{group}.{kind}" for group in (0, 0, 1)]


@pytest.mark.parametrize(
    "changes", [{}, {"expert_groups": None}, {"shared_router": False}, {"expert_groups": [[3, 7]]}]
)
def test_a_shared_router_counts_once(changes, tmp_path: Path) -> None:
    model = make_model("omni_moe", **changes)
    spec, _ = describe(open_checkpoint(save_checkpoint(model, tmp_path)))
    stored = sum(parameter.numel() for parameter in model.parameters())
    assert weights(spec) == stored
    embedding = dict(spec.weights())[EMBEDDING]
    assert weights_in_shards(spec) == stored - math.prod(embedding.shape)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_groups": [[2, 12]]}, "expert_groups"),
        ({"expert_groups": [[2, 12], [1, 0]]}, "expert_groups"),
        ({"expert_groups": [[2, 12], [1.0, 12]]}, "expert_groups"),
        ({"expert_groups": "2x12"}, "expert_groups"),
        ({"expert_groups": [[2, 12], [1, 1]]}, "at most the number of experts, 1"),
        ({"shared_router": None}, "shared_router"),
        ({"shared_router": "yes"}, "shared_router"),
        ({"router_bias": 1}, "router_bias"),
    ],
)
def test_a_senseless_configuration_is_refused(folder: Path, changes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        describe_config(read_config(folder) | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shared_router": False}, r"routers\.2"),
        ({"expert_groups": None}, r"routers\.1"),  # a tensor that nobody reads
        ({"router_bias": False}, "bias"),
        ({"expert_groups": [[1, 12], [2, 11]]}, "11"),
    ],
)
def test_a_configuration_that_is_not_the_checkpoints_is_found(changes, message, tmp_path) -> None:
    folder = save_checkpoint(make_model("omni_moe"), tmp_path)
    with pytest.raises(UserError, match=message):
        describe(open_checkpoint(edit_config(folder, **changes)))


@pytest.mark.parametrize("every", [1, 3, 4])
def test_another_pattern_of_mm1_is_found(every: int, tmp_path: Path) -> None:
    folder = save_checkpoint(make_model("mm1_moe"), tmp_path)
    with pytest.raises(UserError, match="lacks"):
        describe(open_checkpoint(edit_config(folder, moe_layer_freq=every)))


# Recalled from arXiv 2403.09611, not verified: experts, every how manyth layer has them, 1e9
# weights, and those of the dense model that they were made of.
RECALLED = {"mm1-3b-moe": (64, 2, 64, 3), "mm1-7b-moe": (32, 4, 47, 7)}


@pytest.mark.parametrize(("name", "recalled"), RECALLED.items())
def test_parameter_totals_of_mm1(name: str, recalled) -> None:
    experts, every, billions, dense_billions = recalled
    spec = describe_config(published(name))
    sparse = [isinstance(layer.ffn, MoeSpec) for layer in spec.layers]
    assert sparse == [n % every == 0 for n in range(1, len(spec.layers) + 1)]
    routers = {layer.ffn.router for layer in spec.layers if isinstance(layer.ffn, MoeSpec)}
    assert {(router.experts, router.k) for router in routers} == {(experts, 2)}
    assert weights(spec) / 1e9 == pytest.approx(billions, rel=0.015)
    dense = describe_config(published(name) | {"moe_layer_freq": len(spec.layers) + 1})
    assert all(isinstance(layer.ffn, MlpSpec) for layer in dense.layers)
    assert weights(dense) / 1e9 == pytest.approx(dense_billions, rel=0.05)
    # What experts add: all but one of each layer that has them, and its router.
    width, d = dense.layers[0].ffn.width, spec.d_model
    added = sum(sparse) * ((experts - 1) * 3 * width * d + experts * d)
    assert weights(spec) - weights(dense) == added
