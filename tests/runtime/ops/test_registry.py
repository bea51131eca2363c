import subprocess
import sys
from pathlib import Path

import pytest
from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry

from ane_moe.runtime.reference.ops import STRUCTURAL, TABLE

RELEASES = (15, 16, 17, 18)
INTERNAL = {"_const_symbolic"}  # never saved


def declared(ios: int) -> dict:
    """The ops of an iOS release's opset: name -> class."""
    ops = {}
    for name, versions in SSAOpRegistry.core_ops.items():
        fitting = {
            int(target.name[3:]): cls
            for target, cls in versions.items()
            if int(target.name[3:]) <= ios
        }
        if fitting and name not in INTERNAL:
            ops[name] = fitting[max(fitting)]
    return ops


@pytest.mark.parametrize("ios", RELEASES)
def test_every_op_of_the_opset_is_executed(ios: int) -> None:
    for name in declared(ios):
        assert TABLE.find(name, ios) is not None or name in STRUCTURAL, name


@pytest.mark.parametrize("ios", RELEASES)
def test_an_op_takes_every_input_that_its_declaration_has(ios: int) -> None:
    for name, cls in declared(ios).items():
        op = TABLE.find(name, ios)
        if op is None:
            assert name in STRUCTURAL
            continue
        tensors = {spec.rstrip("?*"): spec for spec in op.tensors.split()}
        inputs = cls.input_spec.input_types
        assert inputs.keys() <= tensors.keys() | op.parameters, name
        required = {spec for spec, kind in tensors.items() if not kind.endswith("?")} | op.required
        assert required - {"arith", "out"} <= {
            key for key, kind in inputs.items() if not kind.optional
        }, name


def test_the_op_table_of_the_documentation_is_current() -> None:
    script = Path(__file__).parents[3] / "scripts" / "make_op_table.py"
    stale = "docs/runtime.md is stale: run scripts/make_op_table.py"
    assert (
        subprocess.run([sys.executable, str(script), "--check"], capture_output=True).returncode
        == 0
    ), stale
