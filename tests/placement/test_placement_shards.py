"""Our own shards break no rule that Apple documents or someone measured."""

from pathlib import Path

import pytest

from ane_moe.conversion.pipeline import convert
from ane_moe.conversion.plan import ConvertOptions
from ane_moe.demo import demo_checkpoint
from ane_moe.placement.predicted import predict
from ane_moe.placement.targets import find_target
from tests.models import CONFIGS as TINY
from tests.models import FAMILIES, make_model, save_checkpoint
from tests.placement.real_sizes import distinct_shards, plan_of, write_hollow
from tests.slow_set import slow_but

TARGETS = ("m4-max", "m1", "m2", "iphone-a17")
OPTIONS = (
    {"state": "mlstate", "layout": "bc1s", "routing": "masked"},
    {"state": "explicit", "layout": "bct1", "routing": "soft"},
    {"state": "explicit", "layout": "bc1s", "routing": "masked"},
    {"state": "mlstate", "layout": "bct1", "routing": "masked"},
)
# What may be found, because evidence is divided or because tiny models are tiny.
# conv-depthwise-iphone: short convolutions, which one phone's engine refused and others took.
EXPECTED = {
    "conv-depthwise-iphone",
    "state-access",
    "state-access-m4",
    "cost-small",
    "cost-undecided",
    "cost-not-covered",
    "singleton-last-axis",
    "singleton-last-axis-legal",
}


def reports(packages):
    """For every chip and system."""
    for target in TARGETS:
        for system in (15, 26, 27):
            yield predict(packages, find_target(target, system))


def assert_no_rule_broken(packages, expected=EXPECTED):
    for report in reports(packages):
        found = {
            (report.target, item.rule, item.op_type)
            for row in report.functions
            for item in row.findings
            if item.binding or item.rule not in expected
        }
        assert not found and report.passed


def packages_in(out: Path) -> list[tuple[Path, str]]:
    return [(path, path.relative_to(out).as_posix()) for path in sorted(out.rglob("*.mlpackage"))]


@pytest.mark.parametrize(
    "number",
    slow_but(range(4), range(len(FAMILIES))),  # which have every kind, layout and mode
    ids=lambda number: FAMILIES[number],
)
def test_shards_of_every_family_break_no_rule(number, tmp_path):
    """Each family in another state kind, layout and routing mode; a layer with experts and one
    without."""
    family, options = FAMILIES[number], OPTIONS[number % len(OPTIONS)]
    layers = 2 if "mlp_only_layers" in TINY[family] else 1
    checkpoint = save_checkpoint(
        make_model(family, num_hidden_layers=layers), tmp_path / "checkpoint"
    )
    convert(checkpoint, tmp_path / "out", ConvertOptions(**options, prefill=64))
    assert_no_rule_broken(packages_in(tmp_path / "out"))


@pytest.mark.parametrize("options", OPTIONS[:2], ids=lambda options: "-".join(options.values()))
def test_the_built_in_model_breaks_no_rule(options, tmp_path):
    convert(demo_checkpoint(), tmp_path / "out", ConvertOptions(**options, layers=(0,), prefill=64))
    assert_no_rule_broken(packages_in(tmp_path / "out"))


@pytest.mark.parametrize("model", ["Qwen3-30B-A3B", "Mixtral-8x7B"])
def test_shards_of_real_size_break_no_rule_and_are_large_enough_where_it_is_known(model, tmp_path):
    """Weights are holes in the file, so that the sizes are real and the disk stays empty."""
    shards = distinct_shards(plan_of(model, state="explicit"))
    packages = [(write_hollow(shard, tmp_path), shard.path) for shard in shards]
    assert_no_rule_broken(packages, EXPECTED - {"cost-small"})
    report = predict(packages, find_target())
    moe = [
        row for row in report.functions if row.path.startswith("moe/") and row.weight_bytes > 50e6
    ]
    assert moe and {row.verdict for row in moe} <= {"ane", "uncertain"}
    assert "ane" in {row.verdict for row in moe}
