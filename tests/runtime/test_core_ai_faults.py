"""The faults of Core AI's packages that docs/coreai.md names: its blocks, as they stand there, pass
as long as the fault is there. One that fails may be mended; then the page, and what we do about it,
is to be looked at."""

import importlib.util
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

needs_core_ai = pytest.mark.skipif(
    importlib.util.find_spec("coreai_torch") is None, reason="Core AI's packages are not installed"
)
PAGE = Path(__file__).parents[2] / "docs" / "coreai.md"
SECTION = PAGE.read_text().partition("## Faults of the beta packages\n")[2].partition("\n## ")[0]
ENDS, PROCESS = "# SIGABRT", "import subprocess"  # what a block says that takes seconds


def blocks(text: str) -> list[str]:
    found = re.findall(r"^ *```python\n(.*?)^ *```$", text, re.M | re.S)
    return [textwrap.dedent(block) for block in found]


BEFORE, *BULLETS = re.split(r"^\* (?=\*\*)", SECTION, flags=re.M)
(PREAMBLE,) = blocks(BEFORE)
FAULTS = {re.findall(r"\*\*(.+?)\*\*", one)[0]: blocks(one) for one in BULLETS}


def quick_or_slow() -> list:
    slow = pytest.mark.slow
    return [
        pytest.param(block, id=title, marks=[slow] if ENDS in block or PROCESS in block else [])
        for title, found in FAULTS.items()
        for block in found
    ]


def test_each_fault_has_a_block() -> None:
    assert len(FAULTS) > 9
    assert [title for title, found in FAULTS.items() if len(found) != 1] == []


@needs_core_ai
@pytest.mark.parametrize("block", quick_or_slow())
def test_a_fault_is_still_there(block: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = PREAMBLE + block
    if ENDS in block:
        ended = subprocess.run([sys.executable, "-c", source], capture_output=True)
        assert ended.returncode == -signal.SIGABRT
    else:
        exec(compile(source, str(PAGE), "exec"), {})
