"""The folder of what is made once for all conversions and runs of a user."""

import os
import sys
from pathlib import Path

VARIABLE = "ANE_MOE_CACHE"


def user_cache() -> Path:
    """The folder that ANE_MOE_CACHE names, else the system's own for caches."""
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path("~/Library/Caches/ane-moe").expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ane-moe"
