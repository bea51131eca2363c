"""Modules that are as if they were not installed, to what is imported meanwhile."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def absent_modules(*names: str) -> Iterator[None]:
    """Within, importing one of `names` is an ImportError; afterwards all is as it was."""
    known = {name: sys.modules[name] for name in names if name in sys.modules}
    sys.modules.update(dict.fromkeys(names))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
        sys.modules.update(known)
