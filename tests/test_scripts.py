"""Scripts are run by hand, seldom: that they still fit the code is seen here."""

import importlib
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.mark.parametrize("name", sorted(path.stem for path in SCRIPTS.glob("*.py")))
def test_a_script_finds_all_that_it_imports(name: str, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))  # as python does that runs one
    importlib.import_module(name)
