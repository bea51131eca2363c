"""Mixture-of-Experts language models on the Apple Neural Engine: convert, prove, place, measure.

The verbs of the command line, as functions that take plain values and return dataclasses; imported
when first used.
"""

from importlib import import_module
from typing import Any

VERBS = {
    "outlook": "ane_moe.forecast.outlook",
    "convert": "ane_moe.conversion.pipeline",
    "verify": "ane_moe.verification.verify",
    "bench": "ane_moe.benchmark.measurement",
    "load_shards": "ane_moe.loop.shards",
    "redact": "ane_moe.redaction.redactor",
}
__all__ = list(VERBS)


def __getattr__(name: str) -> Any:
    if name not in VERBS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(VERBS[name]), name)
